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

    /// Every processor with tiles has two megabytes, of which another thread of the core may take a part: most is for
    /// the sums, the rest for two depths of weights and the rows that pass by. In the first-level cache a panel of rows
    /// and its sums have to stay beside the weights of a register block. With few rows, weights of fewer outputs are
    /// asked for at once: their parts displace one another.
    fn blocking(self, rows: usize) -> Blocking {
        let outputs = rows.div_ceil(64).clamp(1, 3) * 3 * OUTPUTS;
        Blocking { panel: LINES, rows: 768, outputs, depth: 8 * LANES }
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
        assert!(b.has(OUTPUTS) && c.len() >= OUTPUTS * lines);
        let (steps, rest) = (b.depth / LANES, b.depth % LANES);
        if steps > 0 {
            // SAFETY: `self` proves that the processor has the instructions; the lengths were checked.
            unsafe { tiles::multiply(a.as_ptr(), lines, Steps::of(b), steps, c.as_mut_ptr(), add) }
        }
        if rest > 0 {
            // The last units, filled up with zeros.
            let full = steps * LANES;
            let (mut x, mut w) = ([Line::ZERO; LANES * LINES], [Line::ZERO; OUTPUTS]);
            x[..rest * lines].copy_from_slice(&a[full * lines..][..rest * lines]);
            for (n, w) in w.iter_mut().enumerate() {
                w.0[..rest].copy_from_slice(&b.units[n * b.stride + steps * b.step..][..rest]);
            }
            let w = Steps::of(Weights::rows(bytemuck::cast_slice(&w), LANES, LANES));
            // SAFETY: as above; both operands are one step deep.
            unsafe { tiles::multiply(x.as_ptr(), lines, w, 1, c.as_mut_ptr(), add || steps > 0) }
        }
    }

    /// What the tiles of a step load lies together.
    fn layout(self, _: usize) -> [usize; 2] {
        [LANES, OUTPUTS * LANES]
    }

    fn pauses(self, depth: usize) -> usize {
        depth / LANES
    }

    fn blocks(self, a: &[Line], lines: usize, b: &[u32], c: &mut [Line], add: bool, mut pause: impl FnMut()) {
        let (depth, steps) = (a.len() / lines, a.len() / lines / LANES);
        assert!((1..=LINES).contains(&lines) && a.len() == steps * LANES * lines);
        let [stride, step] = self.layout(depth);
        let blocks = b.chunks_exact(OUTPUTS * depth).zip(c.chunks_exact_mut(OUTPUTS * lines));
        let mut before = None;
        for (units, c) in blocks {
            let w = Weights { units, depth, stride, step };
            if lines < LINES {
                pause();
                self.tile(a, lines, w, c, add);
                continue;
            }
            let (w, c) = (Steps::of(w), c.as_mut_ptr());
            // The first operands are loaded before the last sums are stored, so that there is something to multiply meanwhile.
            // SAFETY: `self` proves that the processor has the instructions; the lengths are those of a block.
            unsafe {
                tiles::operands(a.as_ptr(), w);
                tiles::first_step(before, c, add);
                pause();
                for at in 1..steps {
                    tiles::step::<true>(a[at * LANES * LINES..].as_ptr(), w.step(at));
                    pause();
                }
            }
            before = Some(c);
        }
        if let Some(c) = before {
            // SAFETY: as above.
            unsafe { tiles::store(c) }
        }
    }
}

/// Few rows would leave tiles nearly empty.
impl Few<bf16> for Amx {
    type X = bf16;

    fn prepare(self, x: &[bf16], inputs: usize) -> Vec<bf16> {
        self.0.prepare(x, inputs)
    }

    fn sums(self, x: &[bf16], weight: &[bf16], inputs: usize, sums: &mut [f32]) {
        self.0.sums(x, weight, inputs, sums);
    }
}
