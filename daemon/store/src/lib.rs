//! sheepdog-store.
