//! The CUDA kernels, compiled by the C++ compiler and run on the processor, beside plain attention.
//!
//! So their arithmetic, their bounds and their barriers are tested where there is no GPU. What only a GPU can show is in
//! docs/cuda.md.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use half::bf16;

/// Compiles the kernels with what stands for CUDA, or says that there is no compiler.
fn emulator(folder: &Path) -> Option<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator");
    let program = folder.join("attention");
    let mut compiler = Command::new(std::env::var_os("CXX").unwrap_or("c++".into()));
    compiler.args(["-std=c++17", "-O2", "-Wno-unknown-pragmas", "-I"]).arg(&source);
    let Ok(status) = compiler.arg(source.join("main.cpp")).arg("-o").arg(&program).status() else {
        eprintln!("skipped: no C++ compiler (c++, or what CXX names)");
        return None;
    };
    assert!(status.success(), "the kernels do not compile");
    Some(program)
}

/// A case of attention: `rows` of `keys`, heads of `dim`, which lie `spare` numbers apart.
#[derive(Debug, Clone, Copy)]
struct Case {
    kernel: &'static str,
    dim: usize,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    rows: usize,
    keys: usize,
    spare: usize,
}

impl Case {
    fn stride(&self) -> usize {
        self.keys * self.dim + self.spare
    }

    fn narrow(&self, x: f32) -> f32 {
        if self.kernel.contains("bf16") { bf16::from_f32(x).to_f32() } else { x }
    }

    /// Numbers of the case's type.
    fn numbers(&self, count: usize, seed: f32) -> Vec<f32> {
        let number = |i: usize| ((i as f32 * 0.7 + seed) * 1.3).sin() * 2.0;
        (0..count).map(|i| self.narrow(number(i))).collect()
    }

    /// What the kernel makes of `q`, `k` and `v`: mixed values, log-sum-exps.
    fn run(&self, program: &Path, inputs: [&[f32]; 3]) -> (Vec<f32>, Vec<f32>) {
        let half = self.kernel.contains("bf16");
        let (grid, threads) = match (self.kernel.starts_with("tiles"), self.dim) {
            (true, 256) => (self.rows.div_ceil(32), 64),
            (true, _) => (self.rows.div_ceil(64), 128),
            (false, _) => (self.rows, 256),
        };
        let numbers =
            [self.heads, self.kv_heads, self.batch, self.rows, self.keys, self.stride(), self.stride()];
        let mut child = Command::new(program)
            .arg(format!("{}_{}", self.kernel, self.dim))
            .args(numbers.iter().chain(&[grid, threads]).map(ToString::to_string))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let bytes: Vec<u8> = inputs
            .concat()
            .iter()
            .flat_map(
                |&x| if half { bf16::from_f32(x).to_le_bytes().to_vec() } else { x.to_le_bytes().to_vec() },
            )
            .collect();
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{self:?}: {}", output.status);
        let mixed = self.batch * self.heads * self.rows * self.dim * if half { 2 } else { 4 };
        let (mixed, lse) = output.stdout.split_at(mixed);
        let wide =
            |bytes: &[u8]| bytes.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect::<Vec<_>>();
        let mixed = match half {
            true => mixed.as_chunks().0.iter().map(|&x| bf16::from_le_bytes(x).to_f32()).collect(),
            false => wide(mixed),
        };
        (mixed, wide(lse))
    }

    /// The same, written out.
    fn plain(&self, [q, k, v]: [&[f32]; 3]) -> (Vec<f32>, Vec<f32>) {
        let &Self { dim, batch, heads, kv_heads, rows, keys, .. } = self;
        let (mut mixed, mut lse) = (vec![0f32; batch * rows * heads * dim], Vec::new());
        for (group, row) in (0..batch * heads).flat_map(|group| (0..rows).map(move |row| (group, row))) {
            let (batch, head) = (group / heads, group % heads);
            let from = (batch * kv_heads + head * kv_heads / heads) * self.stride();
            let query = &q[(group * rows + row) * dim..][..dim];
            let line = |of: usize| from + of * dim..from + (of + 1) * dim;
            let scores: Vec<f32> = (0..=keys - rows + row)
                .map(|key| {
                    let sum: f32 = query.iter().zip(&k[line(key)]).map(|(a, b)| a * b).sum();
                    self.narrow(self.narrow(sum) / (dim as f32).sqrt())
                })
                .collect();
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f32 = scores.iter().map(|score| (score - max).exp()).sum();
            lse.push(max + total.ln());
            let to = &mut mixed[((batch * rows + row) * heads + head) * dim..][..dim];
            for (key, score) in scores.iter().enumerate() {
                let p = self.narrow((score - max).exp() / total);
                to.iter_mut().zip(&v[line(key)]).for_each(|(to, v)| *to += p * v);
            }
        }
        (mixed, lse)
    }
}

#[test]
fn kernels_agree_with_plain_attention() {
    let folder = tempfile::tempdir().unwrap();
    let Some(program) = emulator(folder.path()) else { return };
    let case = |kernel, dim, heads: (usize, usize), (rows, keys), batch, spare| Case {
        kernel,
        dim,
        batch,
        heads: heads.0,
        kv_heads: heads.1,
        rows,
        keys,
        spare,
    };
    let cases = [
        // Decoding: one row, few rows; one key; heads in groups of four, and not in groups.
        case("few_f32", 64, (4, 1), (1, 1), 1, 0),
        case("few_f32", 80, (4, 2), (3, 77), 2, 160),
        case("few_f32", 128, (4, 4), (1, 300), 1, 128),
        case("few_f32", 256, (2, 1), (2, 40), 1, 0),
        case("few_bf16", 64, (4, 2), (8, 90), 1, 64),
        case("few_bf16", 80, (2, 2), (1, 65), 1, 0),
        case("few_bf16", 128, (4, 1), (1, 513), 2, 0),
        case("few_bf16", 256, (1, 1), (3, 10), 1, 0),
        // Prompts: whole tiles and parts of them, with and without a past.
        case("tiles_bf16", 64, (2, 1), (128, 128), 1, 0),
        case("tiles_bf16", 80, (2, 2), (65, 65), 1, 80),
        case("tiles_bf16", 128, (4, 2), (70, 103), 1, 128),
        case("tiles_bf16", 128, (2, 1), (9, 40), 2, 0),
        case("tiles_bf16", 256, (2, 1), (50, 81), 1, 0),
    ];
    for case in cases {
        let q = case.numbers(case.batch * case.heads * case.rows * case.dim, 0.1);
        let stored = case.batch * case.kv_heads * case.stride();
        let (k, v) = (case.numbers(stored, 0.5), case.numbers(stored, 0.9));
        let inputs = [&q[..], &k, &v];
        let ((mixed, lse), (plain, plain_lse)) = (case.run(&program, inputs), case.plain(inputs));
        assert_eq!((mixed.len(), lse.len()), (plain.len(), plain_lse.len()));
        let tolerance = if case.kernel.contains("bf16") { 1.0 / 64.0 } else { 2e-5 };
        for (what, found, expected) in [("values", &mixed, &plain), ("log-sum-exp", &lse, &plain_lse)] {
            for (at, (x, y)) in found.iter().zip(expected).enumerate() {
                assert!((x - y).abs() <= tolerance, "{what} {at} of {case:?}: {x}, expected {y}");
            }
        }
    }
}
