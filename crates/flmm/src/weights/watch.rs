//! What a caller of the loaders chooses and sees, tensor by tensor.

/// Which tensors are read, and who hears of it.
pub(super) struct Watch<'a> {
    /// Whether the tensor of a name is wanted.
    pub(super) keep: &'a dyn Fn(&str) -> bool,
    /// Receives the bytes of every tensor that was read.
    pub(super) read: &'a mut dyn FnMut(u64),
}

impl<'a> Watch<'a> {
    /// Keeps everything.
    pub(super) fn everything(read: &'a mut dyn FnMut(u64)) -> Self {
        Self { keep: &|_| true, read }
    }
}
