//! sheepdog-cluster.
