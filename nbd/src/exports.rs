//! What a server offers: names and the devices behind them.

use std::sync::Arc;

use sheepdog_types::Block;

/// The directory of exports that a server looks names up in.
///
/// Called on connection threads during the handshake; a slow [`Exports::open`] delays only the
/// client that asked.
pub trait Exports: Send + Sync {
    /// Names of all exports that any client may see, each at most 4096 bytes without NUL.
    fn list(&self) -> Vec<String>;

    /// The device behind `name`.
    ///
    /// A client that asks for the empty name gets the only export of [`Exports::list`], if it has
    /// exactly one; that lookup is done by the server, so `name` is empty only if an export is
    /// called so.
    ///
    /// # Errors
    /// [`OpenError`]; its text is shown to the client.
    fn open(&self, name: &str) -> Result<Arc<dyn Block>, OpenError>;
}

/// Why an export cannot be served. The texts go to the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// There is no such export.
    #[error("no export has this name")]
    Unknown,
    /// The export exists but cannot be served now.
    #[error("the export is not available: {0}")]
    Unavailable(String),
    /// This client may not use it.
    #[error("refused: {0}")]
    Refused(String),
    /// The server is going away.
    #[error("the server is shutting down")]
    Shutdown,
}

/// Opens `name`, where the empty name stands for the only export; also gives the export's own name.
pub(crate) fn resolve(
    exports: &dyn Exports,
    name: &str,
) -> Result<(String, Arc<dyn Block>), OpenError> {
    let name = if name.is_empty() {
        let [only] = <[String; 1]>::try_from(exports.list()).map_err(|_| OpenError::Unknown)?;
        only
    } else {
        name.to_owned()
    };
    let block = exports.open(&name)?;
    Ok((name, block))
}
