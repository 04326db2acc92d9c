//! Products of matrices that are parts of larger buffers.

use std::ops::{Deref, DerefMut};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Layout, Result, Shape, Storage, bail};

/// f32 numbers of which products can be made.
pub(crate) struct Buffer(CpuStorage);

impl From<Vec<f32>> for Buffer {
    fn from(numbers: Vec<f32>) -> Self {
        Self(CpuStorage::F32(numbers))
    }
}

impl Buffer {
    /// The numbers themselves.
    pub(crate) fn into_vec(self) -> Vec<f32> {
        match self.0 {
            CpuStorage::F32(numbers) => numbers,
            _ => Vec::new(),
        }
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.0 {
            CpuStorage::F32(numbers) => numbers,
            _ => &[],
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.0 {
            CpuStorage::F32(numbers) => numbers,
            _ => &mut [],
        }
    }
}

/// Numbers of a buffer, from some place on.
#[derive(Clone, Copy)]
pub(crate) struct Numbers<'a> {
    storage: &'a CpuStorage,
    start: usize,
}

impl<'a> From<&'a Buffer> for Numbers<'a> {
    fn from(buffer: &'a Buffer) -> Self {
        Self { storage: &buffer.0, start: 0 }
    }
}

impl<'a> Numbers<'a> {
    /// The elements of a contiguous tensor.
    pub(crate) fn of(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let Some((start, _)) = layout.contiguous_offsets() else { bail!("expected a contiguous tensor") };
        Ok(Self { storage, start })
    }

    /// As [`Numbers::of`], of a tensor on the CPU.
    pub(crate) fn on_cpu(storage: &'a Storage, layout: &Layout) -> Result<Self> {
        match storage {
            Storage::Cpu(storage) => Self::of(storage, layout),
            _ => bail!("expected a tensor on the CPU"),
        }
    }

    /// Those behind the first `count`.
    pub(crate) fn skip(self, count: usize) -> Self {
        Self { start: self.start + count, ..self }
    }

    /// The first `count` of them; fails if there are fewer, or if they are not f32.
    pub(crate) fn first(self, count: usize) -> Result<&'a [f32]> {
        match self.storage.as_slice::<f32>()?.get(self.start..self.start + count) {
            Some(numbers) => Ok(numbers),
            None => bail!("expected {count} numbers"),
        }
    }
}

/// `count` matrices of one size in a buffer.
#[derive(Clone, Copy)]
pub(crate) struct Matrices<'a> {
    numbers: Numbers<'a>,
    /// Matrices, rows, columns.
    sizes: [usize; 3],
    strides: [usize; 3],
}

impl<'a> Matrices<'a> {
    /// One matrix `[rows, columns]`.
    pub(crate) fn one(numbers: impl Into<Numbers<'a>>, rows: usize, columns: usize) -> Self {
        Self::stacked(numbers, [1, rows, columns])
    }

    /// `[count, rows, columns]`
    pub(crate) fn stacked(numbers: impl Into<Numbers<'a>>, sizes: [usize; 3]) -> Self {
        let [_, rows, columns] = sizes;
        Self { numbers: numbers.into(), sizes, strides: [rows * columns, columns, 1] }
    }

    /// `[heads, rows, columns]` where a row has its heads side by side, and rows lie `stride` apart.
    pub(crate) fn heads(numbers: Numbers<'a>, sizes: [usize; 3], stride: usize) -> Self {
        Self { numbers, sizes, strides: [sizes[2], stride, 1] }
    }

    /// Every matrix transposed.
    pub(crate) fn t(self) -> Self {
        let ([n, rows, columns], [a, b, c]) = (self.sizes, self.strides);
        Self { sizes: [n, columns, rows], strides: [a, c, b], ..self }
    }

    fn layout(&self) -> Result<Layout> {
        let last: usize = self.sizes.iter().zip(&self.strides).map(|(n, stride)| (n - 1) * stride).sum();
        // candle's product trusts its layouts.
        self.numbers.first(last + 1)?;
        Ok(Layout::new(Shape::from_dims(&self.sizes), self.strides.to_vec(), self.numbers.start))
    }

    /// The products `[count, rows, columns]` of these matrices and those of `other`.
    pub(crate) fn multiply(self, other: Self) -> Result<Buffer> {
        let ([count, rows, inner], [others, depth, columns]) = (self.sizes, other.sizes);
        if count != others || inner != depth {
            bail!("a product of {:?} and {:?}", self.sizes, other.sizes);
        }
        if count * rows * columns == 0 || inner == 0 {
            return Ok(vec![0.0; count * rows * columns].into());
        }
        let (left, right) = (self.layout()?, other.layout()?);
        let sizes = (count, rows, columns, inner);
        Ok(Buffer(self.numbers.storage.matmul(other.numbers.storage, sizes, &left, &right)?))
    }
}
