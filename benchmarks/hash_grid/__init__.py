"""The hash grid."""
