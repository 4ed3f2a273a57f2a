//! sheepdog.
