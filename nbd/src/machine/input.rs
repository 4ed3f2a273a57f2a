//! The receive buffer that both protocol phases parse from.

/// Bytes received and not yet parsed, in one fixed buffer.
///
/// The space for new bytes is always behind the unparsed ones; [`Input::space`] moves the latter
/// to the front when that is needed, so a parser always sees them in one piece.
#[derive(Debug)]
pub struct Input {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    /// An empty buffer that holds up to `capacity` bytes.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { buffer: vec![0; capacity].into_boxed_slice(), start: 0, end: 0 }
    }

    /// The unparsed bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Marks the first `n` unparsed bytes as parsed.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn consume(&mut self, n: usize) {
        assert!(n <= self.end - self.start, "only what was received can be consumed");
        self.start += n;
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Where the next bytes go; empty if the buffer is full. Call [`Input::received`] afterwards.
    pub fn space(&mut self) -> &mut [u8] {
        if self.start > 0 && self.end > self.buffer.len() / 2 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.buffer[self.end..]
    }

    /// The first `n` bytes of [`Input::space`] are now received bytes.
    ///
    /// # Panics
    /// If the space was smaller.
    pub fn received(&mut self, n: usize) {
        assert!(n <= self.buffer.len() - self.end, "no more than the space can be received");
        self.end += n;
    }

    /// Appends as much of `bytes` as fits; how much that was.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let space = self.space();
        let n = space.len().min(bytes.len());
        space[..n].copy_from_slice(&bytes[..n]);
        self.received(n);
        n
    }
}
