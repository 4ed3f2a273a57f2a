//! dog
fn main() {}
