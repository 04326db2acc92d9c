//! Blocks against the same layers composed of `flmm::nn`, which has tests of its own, and against finite differences.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};
use flmm::nn::{Linear, rms_norm, silu_mul, softmax_last_dim};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

const THETA: f64 = 1e4;
const SIZES: DecoderSizes = DecoderSizes { width: 24, heads: 3, ffn: 20, eps: 1e-5 };

fn random(shape: &[usize], seed: u64, scale: f32) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| scale * rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// A batch of packed conversations.
#[derive(Clone)]
struct Packing {
    prefix: usize,
    /// Lengths of the conversations of every sample; what is missing to the longest sample is padding.
    conversations: Vec<Vec<usize>>,
    maps: Maps,
}

impl Packing {
    fn rows(&self) -> usize {
        self.prefix + self.conversations.iter().map(|lengths| lengths.iter().sum()).max().unwrap_or(0)
    }

    fn batch(&self) -> usize {
        self.conversations.len()
    }

    fn mask(&self) -> Arc<PackedMask> {
        let mut starts = Vec::new();
        for lengths in &self.conversations {
            let first = starts.len();
            starts.extend(vec![0; self.prefix]);
            for length in lengths {
                starts.extend(vec![(starts.len() - first) as u32; *length]);
            }
            starts.extend((starts.len() - first) as u32..self.rows() as u32);
        }
        Arc::new(PackedMask { prefix: self.prefix, starts })
    }

    /// 0 where row `i` of a sample sees row `j`, −1e9 elsewhere: `[B, 1, S, S]`, told by the lengths alone.
    fn hidden(&self) -> Result<Tensor> {
        let rows = self.rows();
        let mut all = Vec::new();
        for lengths in &self.conversations {
            // Number of the conversation of every row behind the prefix; padding is a conversation each.
            let told = lengths.iter().enumerate().flat_map(|(at, length)| vec![at; *length]);
            let of: Vec<usize> = told.chain(lengths.len()..).take(rows - self.prefix).collect();
            for i in 0..rows {
                for j in 0..rows {
                    let same = || i >= self.prefix && of[i - self.prefix] == of[j - self.prefix];
                    let seen = j <= i && (j < self.prefix || same());
                    all.push(if seen { 0f32 } else { -1e9 });
                }
            }
        }
        Tensor::from_vec(all, (self.batch(), 1, rows, rows), &Device::Cpu)
    }

    fn positions(&self) -> Vec<u32> {
        let restart = |(row, start): (usize, &u32)| match row % self.rows() {
            row if row < self.prefix => row as u32,
            row => (self.prefix + row) as u32 - start,
        };
        self.mask().starts.iter().enumerate().map(restart).collect()
    }
}

/// No text, one conversation, several and padding; the image from the third row on.
fn packings() -> Vec<Packing> {
    let maps = Maps { heads: vec![2, 0], first: 2 };
    let packing = |prefix, conversations: &[&[usize]], maps: &Maps| Packing {
        prefix,
        conversations: conversations.iter().map(|lengths| lengths.to_vec()).collect(),
        maps: maps.clone(),
    };
    vec![
        packing(7, &[&[]], &maps),
        packing(5, &[&[9]], &Maps::default()),
        packing(21, &[&[3, 1, 17, 2], &[4], &[]], &maps),
        packing(4, &[&[2, 2], &[1, 3]], &maps),
    ]
}

/// `x` and a layer's tensors as variables.
fn variables(packing: &Packing, sizes: &DecoderSizes) -> Vec<Var> {
    let x = random(&[packing.batch(), packing.rows(), sizes.width], 1, 1.0);
    let mut all = vec![x];
    for (seed, (name, shape)) in (2..).zip(sizes.tensors()) {
        let scale = if name.ends_with("norm") { 1.0 } else { 1.5 / (shape[1] as f32).sqrt() };
        all.push(random(&shape, seed, scale));
    }
    all.iter().map(|t| Var::from_tensor(t).unwrap()).collect()
}

/// The layer as one operation: states and maps.
fn block(packing: &Packing, sizes: &DecoderSizes, t: &[Tensor]) -> Result<Vec<Tensor>> {
    let rotary = Arc::new(Rotary::new(&packing.positions(), sizes.width / sizes.heads, THETA));
    let pass = Pass { sizes: *sizes, mask: packing.mask(), rotary };
    let parts: Vec<Tensor> = t[1..].iter().map(|t| t.flatten_all()).collect::<Result<_>>()?;
    let (y, maps) = decoder_block(&t[0], &Tensor::cat(&parts, 0)?, &pass, &packing.maps)?;
    Ok([vec![y], maps].concat())
}

/// Cosines and sines `[B, 1, S, head / 2]` of the rows' angles.
fn angles(packing: &Packing, head: usize) -> Result<[Tensor; 2]> {
    let angle = |at: u32, i: usize| f64::from(at) / THETA.powf((2 * i) as f64 / head as f64);
    let positions = packing.positions().into_iter();
    let angles: Vec<f64> = positions.flat_map(|at| (0..head / 2).map(move |i| angle(at, i))).collect();
    let shape = (packing.batch(), 1, packing.rows(), head / 2);
    let tensor = |of: fn(f64) -> f64| {
        Tensor::from_vec(angles.iter().map(|angle| of(*angle) as f32).collect(), shape, &Device::Cpu)
    };
    Ok([tensor(f64::cos)?, tensor(f64::sin)?])
}

/// The same from single operations.
fn composed(packing: &Packing, sizes: &DecoderSizes, t: &[Tensor]) -> Result<Vec<Tensor>> {
    let [x, norm, q, k, v, o, post_norm, gate, up, down] = t else { panic!("ten tensors") };
    let (batch, rows, width) = x.dims3()?;
    let head = width / sizes.heads;
    let linear = |x: &Tensor, weight: &Tensor| Linear::new(weight.clone(), None).forward(x).unwrap();
    let normed = rms_norm(x, norm, f64::from(sizes.eps)).unwrap();
    let split = |x: Tensor| x.reshape((batch, rows, sizes.heads, head))?.transpose(1, 2)?.contiguous();
    let [cos, sin] = angles(packing, head)?;
    let rotated = |weight| -> Result<Tensor> {
        let x = split(linear(&normed, weight))?;
        let (a, b) = (x.narrow(3, 0, head / 2)?, x.narrow(3, head / 2, head / 2)?);
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Tensor::cat(&[first, second], 3)
    };
    let scores = (rotated(q)?.matmul(&rotated(k)?.t()?)? / (head as f64).sqrt())?;
    let probs = softmax_last_dim(&scores.broadcast_add(&packing.hidden()?)?).unwrap();
    let y = probs.matmul(&split(linear(&normed, v))?)?.transpose(1, 2)?.reshape((batch, rows, width))?;
    let x = (x + linear(&y, o))?;
    let normed = rms_norm(&x, post_norm, f64::from(sizes.eps)).unwrap();
    let hidden = silu_mul(&linear(&normed, gate), &linear(&normed, up)).unwrap();
    let mut all = vec![(x + linear(&hidden, down))?];
    let Maps { heads, first } = &packing.maps;
    for head in heads {
        all.push(probs.narrow(1, *head, 1)?.squeeze(1)?.narrow(2, *first, packing.prefix - first)?);
    }
    Ok(all)
}

/// `Σ r · y` over all results, with fixed random `r`.
fn mixed(results: &[Tensor]) -> Tensor {
    let terms = results.iter().zip(100..).map(|(y, seed)| {
        // Maps are small numbers.
        let r = random(y.dims(), seed, if seed == 100 { 1.0 } else { 20.0 });
        (y * r).unwrap().sum_all().unwrap()
    });
    terms.reduce(|sum, term| (sum + term).unwrap()).unwrap()
}

fn tensors(variables: &[Var]) -> Vec<Tensor> {
    variables.iter().map(|v| v.as_tensor().clone()).collect()
}

/// Results, then the gradient of [`mixed`] with respect to every variable.
fn everything(variables: &[Var], f: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>) -> (Vec<Tensor>, Vec<Tensor>) {
    let results = f(&tensors(variables)).unwrap();
    let grads = mixed(&results).backward().unwrap();
    (results, variables.iter().map(|v| grads.get(v).expect("a gradient").clone()).collect())
}

/// Largest difference as a share of the largest number.
fn difference(found: &Tensor, expected: &Tensor) -> f32 {
    assert_eq!(found.dims(), expected.dims());
    let largest =
        |t: Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    largest((found - expected).unwrap()) / largest(expected.clone())
}

fn assert_agree(found: (Vec<Tensor>, Vec<Tensor>), expected: (Vec<Tensor>, Vec<Tensor>)) {
    let pairs = |a: &[Tensor], b: &[Tensor], what: &str| {
        assert_eq!(a.len(), b.len());
        for (at, (a, b)) in a.iter().zip(b).enumerate() {
            let difference = difference(a, b);
            assert!(difference < 1e-5, "{what} {at} differs by {difference}");
        }
    };
    pairs(&found.0, &expected.0, "result");
    pairs(&found.1, &expected.1, "gradient");
}

#[test]
fn a_decoder_layer_is_what_it_is_composed_of() {
    for packing in packings() {
        let variables = variables(&packing, &SIZES);
        let found = everything(&variables, |t| block(&packing, &SIZES, t));
        assert_agree(found, everything(&variables, |t| composed(&packing, &SIZES, t)));
    }
}

#[test]
fn gradients_are_slopes() {
    const STEP: f64 = 3e-3;
    for packing in packings() {
        let variables = variables(&packing, &SIZES);
        let (_, gradients) = everything(&variables, |t| block(&packing, &SIZES, t));
        for (at, gradient) in gradients.iter().enumerate() {
            // Along the gradient, where the slope is its length; and aside, where it is not.
            for aside in [0.0, 0.3] {
                let length = gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
                let along = (gradient / f64::from(length)).unwrap();
                let direction = (along + (random(gradient.dims(), 7, 1.0) * aside).unwrap()).unwrap();
                let value = |step: f64| {
                    let mut moved = tensors(&variables);
                    moved[at] = (&moved[at] + (&direction * step).unwrap()).unwrap();
                    f64::from(mixed(&block(&packing, &SIZES, &moved).unwrap()).to_scalar::<f32>().unwrap())
                };
                let slope = (value(STEP) - value(-STEP)) / (2.0 * STEP);
                let expected = (gradient * direction).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
                let error = (slope / f64::from(expected) - 1.0).abs();
                assert!(error < 2e-2, "variable {at}: slope {slope}, gradient {expected}");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    let packing = packings().remove(1);
    let t = tensors(&variables(&packing, &SIZES));
    let short = [&t[..9], &[t[9].narrow(0, 0, 3).unwrap()]].concat();
    assert!(block(&packing, &SIZES, &short).is_err());
    let wide = Packing { conversations: vec![vec![8]], ..packing.clone() };
    assert!(block(&wide, &SIZES, &t).is_err());
    let heads = Packing { maps: Maps { heads: vec![3], first: 0 }, ..packing };
    assert!(block(&heads, &SIZES, &t).is_err());
}
