//! placeholder
use super::world::{Failure, Options};
pub enum Error {
    Syntax(String),
    Run(Failure),
}
pub fn run(_: &str, _: Options) -> Result<Vec<String>, Error> {
    Err(Error::Syntax("no".into()))
}
