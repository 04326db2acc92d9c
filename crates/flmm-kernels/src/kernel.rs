//! The inner products that a matrix product is made of.

use pulp::{Arch, Simd, WithSimd};

use crate::line::{LANES, Line};

/// Weights (outputs) of a register block of vectors.
pub(crate) const OUTPUTS: usize = 6;

/// Weights of a register block: sixteen units from unit `k` of output `n` on lie at `units[n · stride + k / 16 · step..]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weights<'a> {
    pub(crate) units: &'a [u32],
    pub(crate) depth: usize,
    /// From one output to the next.
    pub(crate) stride: usize,
    /// From sixteen units to the next sixteen.
    pub(crate) step: usize,
}

impl<'a> Weights<'a> {
    /// Outputs whose units lie one after the other, `stride` from the first of one to the first of the next.
    pub(crate) fn rows(units: &'a [u32], depth: usize, stride: usize) -> Self {
        Self { units, depth, stride, step: LANES }
    }

    /// Whether there are units of `outputs` outputs.
    pub(crate) fn has(&self, outputs: usize) -> bool {
        let (steps, rest) = (self.depth / LANES, self.depth % LANES);
        let last =
            if rest > 0 { steps * self.step + rest } else { steps.saturating_sub(1) * self.step + LANES };
        self.depth == 0 || self.units.len() >= (outputs - 1) * self.stride + last
    }
}

/// The parts of a product that a thread works on at one time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Blocking {
    /// As [`Kernel::panel`].
    pub(crate) panel: usize,
    /// Most rows: their sums have to fit the second-level cache.
    pub(crate) rows: usize,
    /// Most outputs: so many units of each have to fit it besides. A multiple of [`Kernel::outputs`] and of [`LANES`].
    pub(crate) outputs: usize,
    /// Most units along the inner dimension; a multiple of [`LANES`].
    pub(crate) depth: usize,
}

/// Computes a register block of a product.
pub(crate) trait Kernel: Copy + Send + Sync {
    /// Lines of rows in a register block: it has this many times sixteen rows.
    fn panel(self) -> usize;

    /// Weights (outputs) of a register block.
    fn outputs(self) -> usize {
        OUTPUTS
    }

    /// How a product of so many rows is cut for the second-level cache.
    fn blocking(self, _rows: usize) -> Blocking {
        Blocking { panel: self.panel(), rows: 512, outputs: 96, depth: 256 }
    }

    /// Runs `work`, in which alone [`Kernel::tile`] may be called.
    fn within<R>(self, work: impl FnOnce() -> R) -> R {
        work()
    }

    /// `c[n][row] (+)= Σ_k a[k][row] · b[n][k]` over `depth` units.
    ///
    /// `a [depth, lines]` holds rows side by side; `lines` is at most [`Kernel::panel`]. There are [`Kernel::outputs`]
    /// outputs, whose sums `c [outputs, lines]` are f32; they are added to what is there if `add`.
    fn tile(self, a: &[Line], lines: usize, b: Weights, c: &mut [Line], add: bool);

    /// [`Weights::stride`] and [`Weights::step`] of packed weights.
    fn layout(self, depth: usize) -> [usize; 2] {
        [depth, LANES]
    }

    /// How many times [`Kernel::blocks`] pauses for each register block.
    fn pauses(self, _depth: usize) -> usize {
        1
    }

    /// As [`Kernel::tile`] for the weights of several register blocks, packed by [`Kernel::layout`] one behind the
    /// other, as are their sums in `c`. `depth` is a multiple of [`LANES`]. Now and then calls `pause`, in which
    /// something may be asked for that is needed later.
    fn blocks(self, a: &[Line], lines: usize, b: &[u32], c: &mut [Line], add: bool, mut pause: impl FnMut()) {
        let (depth, outputs) = (a.len() / lines, self.outputs());
        let [stride, step] = self.layout(depth);
        for (units, c) in b.chunks_exact(outputs * depth).zip(c.chunks_exact_mut(outputs * lines)) {
            pause();
            self.tile(a, lines, Weights { units, depth, stride, step }, c, add);
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Kernel for crate::avx512::Avx512Bf16 {
    fn panel(self) -> usize {
        4
    }

    #[inline]
    fn tile(self, a: &[Line], lines: usize, b: Weights, c: &mut [Line], add: bool) {
        match lines {
            1 => self.tile::<1, OUTPUTS>(a, b, c, add),
            2 => self.tile::<2, OUTPUTS>(a, b, c, add),
            3 => self.tile::<3, OUTPUTS>(a, b, c, add),
            _ => self.tile::<4, OUTPUTS>(a, b, c, add),
        }
    }
}

/// Products of f32 units by whatever vector unit the processor has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wide {
    arch: Arch,
    panel: usize,
}

impl Wide {
    /// For this processor.
    pub(crate) fn new() -> Self {
        Self::on(Arch::new())
    }

    /// For the instructions of `arch`.
    pub(crate) fn on(arch: Arch) -> Self {
        Self { arch, panel: arch.dispatch(Panel) }
    }

    /// What it was made for.
    pub(crate) fn arch(self) -> Arch {
        self.arch
    }
}

impl Kernel for Wide {
    fn panel(self) -> usize {
        self.panel
    }

    #[inline]
    fn tile(self, a: &[Line], lines: usize, b: Weights, c: &mut [Line], add: bool) {
        self.arch.dispatch(Tile { a, lines, b, c, add });
    }
}

struct Panel;

impl WithSimd for Panel {
    type Output = usize;

    fn with_simd<S: Simd>(self, _: S) -> usize {
        if S::F32_LANES == LANES { 4 } else { 1 }
    }
}

struct Tile<'a> {
    a: &'a [Line],
    lines: usize,
    b: Weights<'a>,
    c: &'a mut [Line],
    add: bool,
}

impl WithSimd for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match (S::F32_LANES, self.lines) {
            (LANES, 4) => self.run::<S, 4>(simd),
            (LANES, 3) => self.run::<S, 3>(simd),
            (LANES, 2) => self.run::<S, 2>(simd),
            (LANES, _) => self.run::<S, 1>(simd),
            (8, _) => self.run::<S, 2>(simd),
            (4, _) => self.run::<S, 4>(simd),
            (2, _) => self.run::<S, 8>(simd),
            _ => self.run::<S, LANES>(simd),
        }
    }
}

impl Tile<'_> {
    /// `V` vectors hold the rows of `lines` lines.
    #[inline(always)]
    fn run<S: Simd, const V: usize>(self, simd: S) {
        let a: &[f32] = bytemuck::cast_slice(self.a);
        let (a, _) = S::as_simd_f32s(a);
        let a = &a.as_chunks::<V>().0[..self.b.depth];
        let b: [&[u32]; OUTPUTS] = std::array::from_fn(|n| &self.b.units[n * self.b.stride..][..a.len()]);
        let mut sums = [[simd.splat_f32s(0.0); V]; OUTPUTS];
        for (k, rows) in a.iter().enumerate() {
            for (sums, b) in sums.iter_mut().zip(&b) {
                let weight = simd.splat_f32s(f32::from_bits(b[k]));
                for (sum, &row) in sums.iter_mut().zip(rows) {
                    *sum = simd.mul_add_e_f32s(row, weight, *sum);
                }
            }
        }
        for (n, sums) in sums.iter().enumerate() {
            let c: &mut [f32] = bytemuck::cast_slice_mut(&mut self.c[n * self.lines..][..self.lines]);
            for (to, &sum) in S::as_mut_simd_f32s(c).0.iter_mut().zip(sums) {
                *to = if self.add { simd.add_f32s(*to, sum) } else { sum };
            }
        }
    }
}
