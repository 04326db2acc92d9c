//! Products of activations with frozen weights on the processor, on plain slices.
//!
//! A frozen model's time is spent in `y = x·weightᵀ + bias`. Weights stay as the checkpoint stores them, `[outputs,
//! inputs]`, so that they may lie in a mapped file and exist once. Many rows (reading a prompt, a picture) are blocked
//! for the caches and computed at the speed of the arithmetic units; few rows (writing an answer) at the speed at which
//! memory is read. Instructions are chosen when the program runs: AMX tiles or AVX512-BF16 for bf16, else f32 arithmetic on
//! whatever vector unit there is.
//!
//! Every result is a sum in f32, in an order that depends on the sizes alone and not on the number of threads, rounded
//! once.

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod element;
mod few;
mod finish;
mod int4;
mod int8;
mod kernel;
mod line;
mod pack;
pub mod peak;
mod product;
mod rows;
mod softmax;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod tiles;
#[cfg(target_arch = "x86_64")]
mod vnni;

use half::bf16;

pub use attention::{AttentionSizes, Heads, Scores};
pub use int4::Int4Weight;
pub use int8::Int8Weight;
pub use product::Sizes;
pub use rows::{
    add_bf16, layer_norm_bf16, layer_norm_f32, map_bf16, map_f32, rms_norm_bf16, rms_norm_f32, rotate_bf16,
    silu_mul_bf16, zip_map_f32,
};

#[cfg(target_arch = "x86_64")]
use element::Pairs;
use element::{Float, Singles, Units};
use few::{FEW, Few};
use kernel::{Kernel, Wide};

/// `y = x·weightᵀ + bias` in bf16: `x [rows, inputs]`, `weight [outputs, inputs]`, `bias [outputs]`, `y [rows, outputs]`.
///
/// # Panics
/// If a slice is not as long as `sizes` says.
pub fn linear_bf16(x: &[bf16], weight: &[bf16], bias: Option<&[bf16]>, sizes: Sizes, y: &mut [bf16]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(amx) = amx::Amx::detect() {
        return linear::<_, Pairs, _>(amx, x, weight, bias, sizes, y);
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(native) = avx512::Avx512Bf16::detect() {
        return linear::<_, Pairs, _>(native, x, weight, bias, sizes, y);
    }
    linear::<_, Singles, _>(Wide::new(), x, weight, bias, sizes, y);
}

fn linear<T, U, K>(kernel: K, x: &[T], weight: &[T], bias: Option<&[T]>, sizes: Sizes, y: &mut [T])
where
    T: Float,
    U: Units<T>,
    K: Kernel + Few<T>,
{
    let Sizes { rows, inputs, outputs } = sizes;
    assert_eq!(x.len(), rows * inputs, "x is not [{rows}, {inputs}]");
    assert_eq!(weight.len(), outputs * inputs, "the weight is not [{outputs}, {inputs}]");
    assert_eq!(y.len(), rows * outputs, "y is not [{rows}, {outputs}]");
    assert!(bias.is_none_or(|bias| bias.len() == outputs), "the bias is not [{outputs}]");
    if y.is_empty() {
        return;
    }
    if inputs == 0 {
        for y in y.chunks_exact_mut(outputs) {
            match bias {
                Some(bias) => y.copy_from_slice(bias),
                None => y.fill(T::round(0.0)),
            }
        }
    } else if rows <= FEW {
        few::product(kernel, x, weight, bias, sizes, y);
    } else {
        product::product::<T, U, K>(kernel, x, weight, bias, sizes, y);
    }
}

/// Attention in bf16; see [`attention_f32`].
pub fn attention_bf16(
    q: &[bf16],
    kv: [Heads<bf16>; 2],
    sizes: AttentionSizes,
    scores: Scores,
    y: &mut [bf16],
    lse: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    if let Some(amx) = amx::Amx::detect() {
        return attention::attention::<_, Pairs, _>(amx, q, kv, sizes, scores, y, lse);
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(native) = avx512::Avx512Bf16::detect() {
        return attention::attention::<_, Pairs, _>(native, q, kv, sizes, scores, y, lse);
    }
    attention::attention::<_, Singles, _>(Wide::new(), q, kv, sizes, scores, y, lse);
}

/// Softmax of the scores of queries and keys times the values: `q [batch · heads, rows, head_dim]`, keys and values
/// `[batch · kv_heads, keys, head_dim]`, `y [batch, rows, heads · head_dim]`; `lse [batch · heads, rows]` receives the
/// log-sum-exp of every row of scores.
///
/// The softmax is computed in f32; probabilities are rounded to the type of the values, with which they are multiplied.
///
/// # Panics
/// If a slice is not as long as `sizes` says, or a causal attention has more rows than keys.
pub fn attention_f32(
    q: &[f32],
    kv: [Heads<f32>; 2],
    sizes: AttentionSizes,
    scores: Scores,
    y: &mut [f32],
    lse: &mut [f32],
) {
    attention::attention::<_, Singles, _>(Wide::new(), q, kv, sizes, scores, y, lse);
}
