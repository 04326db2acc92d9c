//! Steps between products against the same written out.

use half::bf16;

use super::numbers;

/// The nearest bf16, as an f32.
fn near(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// Whether numbers agree to one rounding.
fn agree(y: &[bf16], expected: impl Iterator<Item = f32>) {
    let mut count = 0;
    for (at, (y, expected)) in y.iter().zip(expected).enumerate() {
        let error = (y.to_f32() - expected).abs();
        assert!(error <= expected.abs() / 128.0 + 1e-6, "number {at}: {y} instead of {expected}");
        count += 1;
    }
    assert_eq!(count, y.len());
}

#[test]
fn norms_of_f32_rows() {
    let (rows, width) = (700, 101);
    let x = numbers::<f32>(rows * width, 21);
    let [weight, bias] = [22, 23].map(|seed| numbers::<f32>(width, seed));
    let mut y = [(); 2].map(|()| vec![f32::NAN; x.len()]);
    crate::layer_norm_f32(&x, &weight, &bias, 1e-5, &mut y[0]);
    crate::rms_norm_f32(&x, &weight, 1e-5, &mut y[1]);
    for (row, x) in x.chunks_exact(width).enumerate() {
        let average = |f: &dyn Fn(f64) -> f64| x.iter().map(|x| f(f64::from(*x))).sum::<f64>() / width as f64;
        let mean = average(&|x| x);
        let (variance, square) = (average(&|x| (x - mean).powi(2)), average(&|x| x * x));
        for (at, x) in x.iter().enumerate() {
            let (x, weight, bias) = (f64::from(*x), f64::from(weight[at]), f64::from(bias[at]));
            let expected =
                [(x - mean) / (variance + 1e-5).sqrt() * weight + bias, x / (square + 1e-5).sqrt() * weight];
            for (y, expected) in y.iter().zip(expected) {
                let y = f64::from(y[row * width + at]);
                assert!((y - expected).abs() < 1e-5, "row {row}, column {at}: {y} instead of {expected}");
            }
        }
    }
}

#[test]
fn norms_of_rows() {
    // More than one task, and a width that fills no vector.
    for (rows, width) in [(1, 5), (3, 33), (700, 100)] {
        let x = numbers::<bf16>(rows * width, 11);
        let [weight, bias] = [12, 13].map(|seed| numbers::<bf16>(width, seed));
        let mut y = vec![bf16::NAN; x.len()];
        let wide = |row: &[bf16]| row.iter().map(|x| x.to_f32()).collect::<Vec<_>>();

        crate::rms_norm_bf16(&x, &weight, 1e-5, &mut y);
        let expected = x.chunks_exact(width).flat_map(|row| {
            let row = wide(row);
            let root = (row.iter().map(|x| x * x).sum::<f32>() / width as f32 + 1e-5).sqrt();
            row.into_iter()
                .zip(&weight)
                .map(move |(x, w)| near(near(x / root) * w.to_f32()))
                .collect::<Vec<_>>()
        });
        agree(&y, expected);

        crate::layer_norm_bf16(&x, &weight, &bias, 1e-5, &mut y);
        let expected = x.chunks_exact(width).flat_map(|row| {
            let row = wide(row);
            let mean = row.iter().sum::<f32>() / width as f32;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / width as f32;
            let scale = weight.iter().zip(&bias);
            let y = row
                .into_iter()
                .zip(scale)
                .map(move |(x, (w, b))| (x - mean) / (variance + 1e-5).sqrt() * w.to_f32() + b.to_f32());
            y.collect::<Vec<_>>()
        });
        // Where terms cancel, a rounding is one of the terms.
        for (y, expected) in y.iter().zip(expected) {
            assert!((y.to_f32() - expected).abs() < 0.02, "{y} instead of {expected}");
        }
    }
}

#[test]
fn gates() {
    let gate: Vec<bf16> = numbers::<f32>(70_000, 14).into_iter().map(|x| bf16::from_f32(x * 30.0)).collect();
    let up = numbers::<bf16>(gate.len(), 15);
    let mut y = vec![bf16::NAN; gate.len()];
    crate::silu_mul_bf16(&gate, &up, &mut y);
    agree(
        &y,
        gate.iter().zip(&up).map(|(g, u)| near(near(g.to_f32() / (1.0 + (-g.to_f32()).exp())) * u.to_f32())),
    );
}

#[test]
fn branches_are_added() {
    let [x, branch] = [19, 20].map(|seed| numbers::<bf16>(70_001, seed));
    let mut y = vec![bf16::NAN; x.len()];
    crate::add_bf16(&x, &branch, &mut y);
    assert!(y.iter().zip(x.iter().zip(&branch)).all(|(y, (x, b))| *y == *x + *b));
}

#[test]
fn rotations() {
    let (heads, rows, half) = (3, 40, 300);
    let x = numbers::<bf16>(heads * rows * 2 * half, 16);
    let [cos, sin] = [17, 18].map(|seed| numbers::<bf16>(rows * half, seed));
    let mut y = vec![bf16::NAN; x.len()];
    crate::rotate_bf16(&x, &cos, &sin, half, &mut y);
    for (at, y) in y.iter().enumerate() {
        let (row, column) = (at / (2 * half) % rows, at % (2 * half));
        let angle = row * half + column % half;
        let (other, sign) = if column < half { (at + half, -1.0) } else { (at - half, 1.0) };
        let product = |x: bf16, angle: bf16| near(x.to_f32() * angle.to_f32());
        assert_eq!(y.to_f32(), near(product(x[at], cos[angle]) + sign * product(x[other], sin[angle])));
    }
}
