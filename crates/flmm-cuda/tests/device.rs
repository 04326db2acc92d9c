//! Attention on a CUDA device beside the same of candle's operations on the processor. Without a device it is skipped,
//! and says so.
#![cfg(feature = "cuda")]

use candle_core::{D, DType, Device, Result, Tensor};
use flmm_cuda::{causal_attention, open};

fn random(shape: (usize, usize, usize), seed: f64) -> Result<Tensor> {
    let count = shape.0 * shape.1 * shape.2;
    let values = (0..count).map(|i| ((i as f64 * 0.7 + seed) * 1.3).sin() as f32 * 2.0);
    Tensor::from_iter(values, &Device::Cpu)?.reshape(shape)
}

/// In f32 from what `dtype` can hold: values `[rows, heads · d]`, log-sum-exps `[heads, rows]`.
fn plain(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
    let ((heads, rows, dim), (kv_heads, keys, _)) = (q.dims3()?, k.dims3()?);
    let every = |x: &Tensor| {
        let x = x.unsqueeze(1)?.broadcast_as((kv_heads, heads / kv_heads, keys, dim))?;
        x.reshape((heads, keys, dim))
    };
    let scores = (q.matmul(&every(k)?.t()?)? / (dim as f64).sqrt())?;
    let mask: Vec<f32> = (0..rows)
        .flat_map(|row| {
            (0..keys).map(move |key| if key > keys - rows + row { f32::NEG_INFINITY } else { 0.0 })
        })
        .collect();
    let scores = scores.broadcast_add(&Tensor::from_vec(mask, (rows, keys), &Device::Cpu)?)?;
    let max = scores.max_keepdim(D::Minus1)?;
    let exp = scores.broadcast_sub(&max)?.exp()?;
    let sum = exp.sum_keepdim(D::Minus1)?;
    let mixed = exp.broadcast_div(&sum)?.matmul(&every(v)?)?.transpose(0, 1)?.reshape((rows, heads * dim))?;
    Ok((mixed, (max + sum.log()?)?.squeeze(2)?))
}

#[test]
fn kernels_agree_with_plain_attention() -> Result<()> {
    let device = match open(0) {
        Ok(device) => device,
        Err(error) => {
            eprintln!("skipped: {error}");
            return Ok(());
        }
    };
    for dim in [64, 80, 128, 256] {
        for (dtype, rows, keys) in [
            (DType::F32, 1, 700),
            (DType::F32, 8, 75),
            (DType::BF16, 1, 3000),
            (DType::BF16, 8, 75),
            (DType::BF16, 9, 75),
            (DType::BF16, 640, 640),
            (DType::BF16, 100, 741),
        ] {
            let (heads, kv_heads) = (8, 2);
            // Keys and values are views into longer buffers, as a cache gives them.
            let held = |x: Tensor| x.to_dtype(dtype)?.to_device(&device);
            let q = held(random((heads, rows, dim), 0.1)?)?;
            let k = held(random((kv_heads, keys + 5, dim), 0.5)?)?.narrow(1, 3, keys)?;
            let v = held(random((kv_heads, keys + 2, dim), 0.9)?)?.narrow(1, 0, keys)?;
            let found = causal_attention([&q, &k, &v], 1)?;
            let (mixed, lse) = found.unwrap_or_else(|| panic!("no kernel for {dtype:?} {rows} {keys} {dim}"));
            let back = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous();
            let (expected, expected_lse) = plain(&back(&q)?, &back(&k)?, &back(&v)?)?;
            let off =
                |a: &Tensor, b: &Tensor| (back(a)? - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
            let tolerance = if dtype == DType::F32 { 1e-4 } else { 1.0 / 32.0 };
            let off = (off(&mixed.squeeze(0)?, &expected)?, off(&lse, &expected_lse)?);
            println!("{dtype:?} rows {rows} keys {keys} dim {dim}: {off:?}");
            assert!(off.0 <= tolerance && off.1 <= tolerance, "{dtype:?} {rows} {keys} {dim}: {off:?}");
        }
    }
    Ok(())
}
