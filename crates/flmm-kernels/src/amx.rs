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
use crate::kernel::{Blocking, Kernel, Sums, Weights};
use crate::line::{Ahead, LANES, Line};
use crate::tiles::{self, Steps};

/// Outputs of a register block: two tiles.
pub(crate) const OUTPUTS: usize = 2 * LANES;
/// Lines of rows of a register block: two tiles.
pub(crate) const LINES: usize = 2;
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

    /// Every processor with tiles has two megabytes, of which another thread of the core may take a part: for the sums, and twice the
    /// rows of one depth. In the first-level cache a panel of rows, its sums and the weights of a register block have to stay.
    fn blocking(self) -> Blocking {
        Blocking { panel: LINES, rows: 768, outputs: 9 * OUTPUTS, depth: 8 * LANES }
    }

    fn within<R>(self, work: impl FnOnce() -> R) -> R {
        // SAFETY: `self` proves that the processor has the instructions; nothing but tiles is changed.
        unsafe { asm!("ldtilecfg [{config}]", config = in(reg) &CONFIG, options(nostack, readonly)) };
        let result = work();
        // SAFETY: as above.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
        result
    }

    fn tile(self, a: &[Line], lines: usize, b: Weights, c: &mut [Line], add: bool) {
        assert!((1..=LINES).contains(&lines) && a.len() >= b.depth * lines);
        assert!(b.units.len() >= (OUTPUTS - 1) * b.stride + b.depth);
        assert!(c.len() >= OUTPUTS * lines);
        let (steps, rest) = (b.depth / LANES, b.depth % LANES);
        if steps > 0 {
            let (x, w) = (a.as_ptr(), Steps { first: b.units.as_ptr(), stride: b.stride });
            // SAFETY: `self` proves that the processor has the instructions; the lengths were checked.
            unsafe { tiles::multiply(x, lines, w, steps, c.as_mut_ptr(), add) }
        }
        if rest > 0 {
            // The last units, filled up with zeros.
            let full = steps * LANES;
            let (mut x, mut w) = ([Line::ZERO; LANES * LINES], [Line::ZERO; OUTPUTS]);
            x[..rest * lines].copy_from_slice(&a[full * lines..][..rest * lines]);
            for (n, w) in w.iter_mut().enumerate() {
                w.0[..rest].copy_from_slice(&b.units[n * b.stride + full..][..rest]);
            }
            let (x, w) = (x.as_ptr(), Steps { first: w.as_ptr().cast(), stride: LANES });
            // SAFETY: as above; both operands are one step deep.
            unsafe { tiles::multiply(x, lines, w, 1, c.as_mut_ptr(), add || steps > 0) }
        }
    }

    fn panels(self, a: &[Line], lines: usize, b: Weights, c: &mut Sums, add: bool, mut ahead: Ahead) {
        let (steps, pairs) = (b.depth / LANES, lines / LINES);
        assert!(b.depth.is_multiple_of(LANES) && steps > 0 && a.len() >= b.depth * lines);
        assert!(b.units.len() >= (OUTPUTS - 1) * b.stride + b.depth);
        assert!(c.first + OUTPUTS <= c.outputs && c.all.len() >= c.outputs * lines);
        let share = ahead.share(pairs * steps + lines % LINES);
        let w = Steps { first: b.units.as_ptr(), stride: b.stride };
        let mut before = None;
        for at in 0..pairs {
            let x = a[at * LINES * b.depth..].as_ptr();
            let sums = c.panel(at * LINES, LINES).as_mut_ptr();
            // SAFETY: `self` proves that the processor has the instructions; the lengths were checked.
            unsafe {
                tiles::operands(x, w);
                tiles::first_step(before, sums, add);
                ahead.fetch(share);
                for step in 1..steps {
                    tiles::step(x.add(step * LANES * LINES), w.step(step));
                    ahead.fetch(share);
                }
            }
            before = Some(sums);
        }
        if let Some(sums) = before {
            // SAFETY: as above.
            unsafe { tiles::store(sums) }
        }
        if !lines.is_multiple_of(LINES) {
            ahead.fetch(share);
            let at = pairs * LINES;
            self.tile(&a[at * b.depth..], lines - at, b, c.panel(at, lines - at), add);
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
