//! sheepdog-log.
