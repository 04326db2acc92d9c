//! What a checkpoint says about its tensors before they are read.

/// Name, type and shape of a tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Type of its elements, as safetensors names it: `F32`, `BF16` …
    pub dtype: String,
    /// Lengths of its axes.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Number of elements. A file can claim any shape, so the count ends at the largest number.
    pub fn elements(&self) -> usize {
        self.shape.iter().fold(1, |count: usize, &length| count.saturating_mul(length))
    }

    /// Whether its elements are floating-point numbers.
    pub fn is_float(&self) -> bool {
        self.dtype.starts_with('F') || self.dtype.starts_with("BF")
    }
}
