//! The command line.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::{Failure, USAGE};

const OPTIONS: [&str; 12] = [
    "objects", "volume", "delete", "threads", "seconds", "ops", "rounds", "slabs", "from", "cold",
    "touch", "seed",
];

/// A case and its options.
pub(crate) struct Args {
    pub(crate) case: String,
    pub(crate) dir: PathBuf,
    options: BTreeMap<String, f64>,
}

impl Args {
    pub(crate) fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, Failure> {
        let case = words.next().ok_or(USAGE)?;
        let (mut dir, mut options) = (None, BTreeMap::new());
        while let Some(word) = words.next() {
            let name = word.strip_prefix("--").ok_or_else(|| format!("not an option: {word}"))?;
            let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
            if name == "dir" {
                dir = Some(PathBuf::from(value));
            } else if OPTIONS.contains(&name) {
                let number = value.parse().map_err(|_| format!("{word} needs a number"))?;
                options.insert(name.to_owned(), number);
            } else {
                return Err(format!("no such option: {word}\n{USAGE}").into());
            }
        }
        Ok(Self { case, dir: dir.ok_or("--dir is missing")?, options })
    }

    /// An option given as a number, if it is given.
    pub(crate) fn given(&self, name: &str) -> Option<f64> {
        debug_assert!(OPTIONS.contains(&name));
        self.options.get(name).copied()
    }

    pub(crate) fn seconds(&self, default: f64) -> f64 {
        self.given("seconds").unwrap_or(default)
    }

    pub(crate) fn count(&self, name: &str, default: u32) -> u32 {
        self.given(name).map_or(default, |value| value as u32)
    }
}
