//! Blocks of two by two AMX tiles, piece by piece: what a piece leaves in the tiles the next one finds there.
//!
//! Tiles 0 to 3 hold the sums of outputs 0–15 (0, 1) and 16–31 (2, 3) for the first (0, 2) and second line of rows (1,
//! 3), tiles 4 and 5 the weights of one step, tiles 6 and 7 the rows. A step is sixteen units deep.
#![allow(
    unsafe_code,
    reason = "instructions without intrinsics take pointers and need a processor that has them"
)]

use std::arch::asm;

use crate::amx::LINES;
use crate::kernel::Weights;
use crate::line::{LANES, Line};

/// Bytes from one unit of a panel of two lines to the next, and from one output to the next in its sums.
const PAIR: usize = LINES * size_of::<Line>();

/// As [`Weights`], step by step, unchecked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Steps {
    first: *const u32,
    /// From one output to the next, in units.
    stride: usize,
    /// From one step to the next, in units.
    step: usize,
}

impl Steps {
    pub(crate) fn of(weights: Weights) -> Self {
        Self { first: weights.units.as_ptr(), stride: weights.stride, step: weights.step }
    }

    /// The weights from step `step` on.
    pub(crate) fn step(self, step: usize) -> Self {
        Self { first: self.first.wrapping_add(step * self.step), ..self }
    }

    /// The outputs of the second tile.
    fn second(self) -> *const u32 {
        self.first.wrapping_add(LANES * self.stride)
    }

    fn stride_bytes(self) -> usize {
        self.stride * size_of::<u32>()
    }
}

macro_rules! load_operands {
    () => {
        "tileloadd tmm4, [{w} + {ws}*1]
        tileloadd tmm6, [{x} + {xs}*1]
        tileloadd tmm7, [{x} + {xs}*1 + 64]
        tileloadd tmm5, [{w2} + {ws}*1]"
    };
}

/// Asks for eight lines from so many bytes after `w`.
macro_rules! prefetch_lines {
    ($from:literal) => {
        concat!(
            ".irp line, 0, 64, 128, 192, 256, 320, 384, 448\nprefetcht0 [{w} + ",
            $from,
            " + \\line]\n.endr"
        )
    };
}

macro_rules! load {
    ($tile:literal, $from:expr, $at:literal) => {
        asm!(
            concat!("tileloadd ", $tile, ", [{from} + {stride}*1 + ", $at, "]"),
            from = in(reg) $from,
            stride = in(reg) PAIR,
            options(nostack, readonly, preserves_flags),
        )
    };
}

macro_rules! store {
    ($tile:literal, $to:expr, $at:literal) => {
        asm!(
            concat!("tilestored [{to} + {stride}*1 + ", $at, "], ", $tile),
            to = in(reg) $to,
            stride = in(reg) PAIR,
            options(nostack, preserves_flags),
        )
    };
}

/// Loads the operands of one step: `x [16, 2]` lines of a panel, and the weights.
///
/// # Safety
/// The processor must have AMX for bf16 with tiles of sixteen rows of 64 bytes; the operands must be that large.
#[inline(always)]
pub(crate) unsafe fn operands(x: *const Line, w: Steps) {
    // SAFETY: as the caller promises.
    unsafe {
        asm!(
            load_operands!(),
            w = in(reg) w.first,
            w2 = in(reg) w.second(),
            ws = in(reg) w.stride_bytes(),
            x = in(reg) x,
            xs = in(reg) PAIR,
            options(nostack, readonly, preserves_flags),
        );
    }
}

/// The products of the operands that [`operands`] loaded, added to `c [32, 2]` if `add`; first of all stores the sums
/// in the tiles at `before`.
///
/// Each tile by itself, because a load waits until all stores before it know what they store: 52 cycles from the
/// beginning of a tile's last product.
///
/// # Safety
/// As for [`operands`].
#[inline(always)]
pub(crate) unsafe fn first_step(before: Option<*mut Line>, c: *const Line, add: bool) {
    macro_rules! start {
        ($tile:literal, $operands:literal, $at:literal) => {
            if let Some(before) = before {
                store!($tile, before, $at);
            }
            match add {
                true => load!($tile, c, $at),
                false => asm!(concat!("tilezero ", $tile), options(nostack, nomem, preserves_flags)),
            }
            asm!(concat!("tdpbf16ps ", $tile, ", ", $operands), options(nostack, nomem, preserves_flags));
        };
    }
    // SAFETY: as the caller promises.
    unsafe {
        start!("tmm0", "tmm4, tmm6", 0);
        start!("tmm1", "tmm4, tmm7", 64);
        start!("tmm2", "tmm5, tmm6", 2048);
        start!("tmm3", "tmm5, tmm7", 2112);
    }
}

/// Adds the products of a further step. With `AHEAD`, asks for the weights of the one after it, which then lie behind
/// those of this one, perhaps in the second-level cache.
///
/// # Safety
/// As for [`operands`].
#[inline(always)]
pub(crate) unsafe fn step<const AHEAD: bool>(x: *const Line, w: Steps) {
    macro_rules! products {
        ($($products:expr),*) => {
            asm!(
                load_operands!(),
                $($products,)*
                w = in(reg) w.first,
                w2 = in(reg) w.second(),
                ws = in(reg) w.stride_bytes(),
                x = in(reg) x,
                xs = in(reg) PAIR,
                options(nostack, readonly, preserves_flags),
            )
        };
    }
    // SAFETY: as the caller promises; prefetching has no effect on memory and never faults.
    unsafe {
        match AHEAD {
            true => products!(
                "tdpbf16ps tmm0, tmm4, tmm6",
                prefetch_lines!(2048),
                "tdpbf16ps tmm1, tmm4, tmm7",
                prefetch_lines!(2560),
                "tdpbf16ps tmm2, tmm5, tmm6",
                prefetch_lines!(3072),
                "tdpbf16ps tmm3, tmm5, tmm7",
                prefetch_lines!(3584)
            ),
            false => products!(
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7"
            ),
        }
    }
}

/// Stores the sums at `c [32, 2]`.
///
/// # Safety
/// As for [`operands`].
#[inline(always)]
pub(crate) unsafe fn store(c: *mut Line) {
    // SAFETY: as the caller promises.
    unsafe {
        store!("tmm0", c, 0);
        store!("tmm1", c, 64);
        store!("tmm2", c, 2048);
        store!("tmm3", c, 2112);
    }
}

/// `c [32, lines] (+)= x [16 · steps, lines] · w`, of one or two lines.
///
/// # Safety
/// As for [`operands`].
pub(crate) unsafe fn multiply(x: *const Line, lines: usize, w: Steps, steps: usize, c: *mut Line, add: bool) {
    // SAFETY: as the caller promises.
    unsafe {
        if lines == LINES {
            operands(x, w);
            first_step(None, c, add);
            for at in 1..steps {
                step::<false>(x.add(at * LANES * LINES), w.step(at));
            }
            store(c);
        } else {
            single(x, w, steps, c, add);
        }
    }
}

/// As [`multiply`], of one line: in tiles 0, 2, 4, 5 and 6.
unsafe fn single(x: *const Line, w: Steps, steps: usize, c: *mut Line, add: bool) {
    // SAFETY: as the caller promises.
    unsafe {
        asm!(
            "test {add}, {add}",
            "jnz 3f",
            "tilezero tmm0",
            "tilezero tmm2",
            "jmp 2f",
            "3:",
            "tileloadd tmm0, [{c} + {line}*1]",
            "tileloadd tmm2, [{c} + {line}*1 + 1024]",
            "2:",
            "tileloadd tmm6, [{x} + {line}*1]",
            "tileloadd tmm4, [{w} + {ws}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{w2} + {ws}*1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "add {w}, {step}",
            "add {w2}, {step}",
            "add {x}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{c} + {line}*1], tmm0",
            "tilestored [{c} + {line}*1 + 1024], tmm2",
            add = in(reg) usize::from(add),
            c = in(reg) c,
            line = in(reg) size_of::<Line>(),
            w = inout(reg) w.first => _,
            w2 = inout(reg) w.second() => _,
            ws = in(reg) w.stride_bytes(),
            step = in(reg) w.step * size_of::<u32>(),
            x = inout(reg) x => _,
            steps = inout(reg) steps => _,
            options(nostack),
        );
    }
}
