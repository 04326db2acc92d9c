//! Products of bf16 pairs in AMX tiles: sixteen outputs by sixteen rows, 32 deep, in one instruction.
//!
//! Both operands are what the other kernels have. A tile's row is a cache line: of the weights sixteen units of one
//! output, as the checkpoint stores them; of the packed activations one unit of sixteen rows.
//!
//! Rust has no intrinsics for tiles yet, and the compiler never uses them, so that they keep what one block of assembly
//! leaves for the next.
#![allow(
    unsafe_code,
    reason = "instructions without intrinsics take pointers and need a processor that has them"
)]

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use half::bf16;

use crate::avx512::Avx512Bf16;
use crate::few::Few;
use crate::kernel::{Blocking, Kernel, Weights};
use crate::line::{LANES, Line};

/// Outputs of a register block: two tiles.
const OUTPUTS: usize = 2 * LANES;
/// Lines of rows of a register block: two tiles.
const LINES: usize = 2;
/// Operations of one instruction.
const OPERATIONS: usize = 2 * LANES * LANES * 2 * LANES;
/// Instructions of one turn of a loop that only multiplies.
const INSTRUCTIONS: usize = 4;

/// Proof that the processor has AMX for bf16, that the system lets this process use it, and that there is AVX512-BF16 for
/// what tiles are too large for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Amx(Avx512Bf16);

impl Amx {
    /// The proof, on such a processor.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        static USABLE: OnceLock<bool> = OnceLock::new();
        let native = Avx512Bf16::detect()?;
        USABLE.get_or_init(|| has_tiles() && system_agrees()).then_some(Self(native))
    }

    /// Multiplies in registers, `turns` times; returns the number of operations, additions counted apart.
    pub(crate) fn spin(self, turns: usize) -> usize {
        // SAFETY: `self` proves that the processor has the instructions; nothing but tiles is changed.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {turns}",
                "jnz 2b",
                "tilerelease",
                config = in(reg) &CONFIG,
                turns = inout(reg) turns.max(1) => _,
                options(nostack, readonly),
            );
        }
        turns.max(1) * INSTRUCTIONS * OPERATIONS
    }
}

/// Tiles of sixteen rows of 64 bytes, as `ldtilecfg` reads it.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Whether the processor has tiles and bf16 products of them, and the system saves them when it changes threads.
fn has_tiles() -> bool {
    const TILE_STATE: u32 = 0b11 << 17;
    // Leaf 7 is there: AVX-512 was found by it. In `edx`: AMX-BF16, AMX-TILE.
    let features = __cpuid_count(7, 0).edx;
    if features & (1 << 22) == 0 || features & (1 << 24) == 0 {
        return false;
    }
    let enabled: u32;
    // SAFETY: AVX-512 was found, and with it the system's use of `xgetbv`.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") enabled, out("edx") _, options(nomem, nostack)) };
    enabled & TILE_STATE == TILE_STATE
}

/// Asks Linux for the large state that tiles need; it is given to the whole process.
#[cfg(target_os = "linux")]
fn system_agrees() -> bool {
    const ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let status: isize;
    // SAFETY: the call takes two numbers and touches no memory of this process.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => status,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") TILE_DATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    status == 0
}

/// Other systems have not been tried.
#[cfg(not(target_os = "linux"))]
fn system_agrees() -> bool {
    false
}

impl Kernel for Amx {
    fn panel(self) -> usize {
        LINES
    }

    fn outputs(self) -> usize {
        OUTPUTS
    }

    /// Every processor with tiles has two megabytes. Rows are read from behind that cache once for each block of outputs:
    /// with a third of these outputs a product takes a sixth longer.
    fn blocking(self) -> Blocking {
        Blocking { panel: LINES, rows: 768, outputs: 9 * OUTPUTS }
    }

    fn within<R>(self, work: impl FnOnce() -> R) -> R {
        // SAFETY: `self` proves that the processor has the instructions; nothing but tiles is changed.
        unsafe { asm!("ldtilecfg [{config}]", config = in(reg) &CONFIG, options(nostack, readonly)) };
        let result = work();
        // SAFETY: as above.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
        result
    }

    fn tile(self, a: &[Line], lines: usize, b: Weights, c: &mut [Line], stride: usize, add: bool) {
        assert!((1..=LINES).contains(&lines) && a.len() >= b.depth * lines);
        assert!(b.units.len() >= (OUTPUTS - 1) * b.stride + b.depth);
        assert!(c.len() >= (OUTPUTS - 1) * stride + lines);
        let (steps, rest) = (b.depth / LANES, b.depth % LANES);
        if steps > 0 {
            // SAFETY: `self` proves that the processor has the instructions; the lengths were checked.
            unsafe {
                multiply(a.as_ptr(), lines, (b.units.as_ptr(), b.stride), steps, c.as_mut_ptr(), stride, add)
            }
        }
        if rest > 0 {
            // The last units, filled up with zeros.
            let full = steps * LANES;
            let (mut x, mut w) = ([Line::ZERO; LANES * LINES], [Line::ZERO; OUTPUTS]);
            x[..rest * lines].copy_from_slice(&a[full * lines..][..rest * lines]);
            for (n, w) in w.iter_mut().enumerate() {
                w.0[..rest].copy_from_slice(&b.units[n * b.stride + full..][..rest]);
            }
            let add = add || steps > 0;
            // SAFETY: as above; both operands are one tile deep.
            unsafe { multiply(x.as_ptr(), lines, (w.as_ptr().cast(), LANES), 1, c.as_mut_ptr(), stride, add) }
        }
    }
}

/// As [`Kernel::tile`], `16 · steps` deep; weights are a pointer and the units from one output to the next.
///
/// # Safety
/// The processor must have AMX for bf16, tiles must be configured by [`CONFIG`]; `x` must have `16 · steps · lines` lines, `w` as many units of [`OUTPUTS`]
/// outputs, and `c` [`OUTPUTS`] times `lines` lines, `stride` apart.
unsafe fn multiply(
    x: *const Line,
    lines: usize,
    (w, w_stride): (*const u32, usize),
    steps: usize,
    c: *mut Line,
    stride: usize,
    add: bool,
) {
    let (x_bytes, w_bytes, c_bytes) = (lines * 64, w_stride * 4, stride * 64);
    let (w_second, c_second) = (w.wrapping_add(LANES * w_stride), c.wrapping_add(LANES * stride));
    if lines == LINES {
        // SAFETY: the caller vouches for all lengths.
        unsafe {
            asm!(
                "test {add}, {add}",
                "jnz 3f",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "jmp 2f",
                "3:",
                "tileloadd tmm0, [{c} + {cs}*1]",
                "tileloadd tmm1, [{c} + {cs}*1 + 64]",
                "tileloadd tmm2, [{c2} + {cs}*1]",
                "tileloadd tmm3, [{c2} + {cs}*1 + 64]",
                "2:",
                "tileloadd tmm4, [{w} + {ws}*1]",
                "tileloadd tmm6, [{x} + {xs}*1]",
                "tileloadd tmm7, [{x} + {xs}*1 + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{w2} + {ws}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {w}, 64",
                "add {w2}, 64",
                "add {x}, 2048",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{c} + {cs}*1], tmm0",
                "tilestored [{c} + {cs}*1 + 64], tmm1",
                "tilestored [{c2} + {cs}*1], tmm2",
                "tilestored [{c2} + {cs}*1 + 64], tmm3",
                add = in(reg) usize::from(add),
                c = in(reg) c,
                c2 = in(reg) c_second,
                cs = in(reg) c_bytes,
                w = inout(reg) w => _,
                w2 = inout(reg) w_second => _,
                ws = in(reg) w_bytes,
                x = inout(reg) x => _,
                xs = in(reg) x_bytes,
                steps = inout(reg) steps => _,
                options(nostack),
            );
        }
    } else {
        // SAFETY: the caller vouches for all lengths.
        unsafe {
            asm!(
                "test {add}, {add}",
                "jnz 3f",
                "tilezero tmm0",
                "tilezero tmm2",
                "jmp 2f",
                "3:",
                "tileloadd tmm0, [{c} + {cs}*1]",
                "tileloadd tmm2, [{c2} + {cs}*1]",
                "2:",
                "tileloadd tmm6, [{x} + {xs}*1]",
                "tileloadd tmm4, [{w} + {ws}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{w2} + {ws}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "add {w}, 64",
                "add {w2}, 64",
                "add {x}, 1024",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{c} + {cs}*1], tmm0",
                "tilestored [{c2} + {cs}*1], tmm2",
                add = in(reg) usize::from(add),
                c = in(reg) c,
                c2 = in(reg) c_second,
                cs = in(reg) c_bytes,
                w = inout(reg) w => _,
                w2 = inout(reg) w_second => _,
                ws = in(reg) w_bytes,
                x = inout(reg) x => _,
                xs = in(reg) x_bytes,
                steps = inout(reg) steps => _,
                options(nostack),
            );
        }
    }
}

/// Few rows would leave tiles nearly empty.
impl Few<bf16> for Amx {
    type X = bf16;

    fn prepare(self, x: &[bf16]) -> Vec<bf16> {
        self.0.prepare(x)
    }

    fn sums(self, x: &[bf16], weight: &[bf16], inputs: usize, sums: &mut [f32]) {
        self.0.sums(x, weight, inputs, sums);
    }
}
