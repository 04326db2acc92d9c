//! Launching the kernels of `attention.cu`.

use candle_core::cuda::cudarc::driver::{CudaSlice, CudaView, DeviceRepr, LaunchConfig, PushKernelArg};
use candle_core::cuda::{CudaDType, CudaDevice, CudaStorage, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Layout, Result, Shape, Storage, Tensor, WithDType};
use half::bf16;

/// The kernels, compiled by `build.rs`.
const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/attention.ptx"));

/// Head sizes that have kernels.
const DIMS: [usize; 4] = [64, 80, 128, 256];
/// Threads of a block of `few_*`, as in `attention.cu`.
const THREADS: usize = 256;
/// Up to so many rows of bf16 a block per row is used; more are taken by tensor cores, 16 at a time.
const FEW: usize = 8;
/// Shared memory in bytes that a block has without asking.
const SHARED: usize = 48 << 10;

/// Which kernel computes something, and how it is launched.
struct Plan {
    kernel: String,
    config: LaunchConfig,
}

impl Plan {
    /// `None` where no kernel fits.
    fn new(dtype: DType, groups: usize, rows: usize, keys: usize, head_dim: usize) -> Option<Self> {
        if !DIMS.contains(&head_dim) || rows == 0 || rows > keys || groups == 0 || groups > 65_535 {
            return None;
        }
        if dtype == DType::BF16 && rows > FEW {
            let warps = if head_dim == 256 { 2 } else { 4 };
            let config = LaunchConfig {
                grid_dim: (rows.div_ceil(16 * warps) as u32, groups as u32, 1),
                block_dim: (32 * warps as u32, 1, 1),
                shared_mem_bytes: 0,
            };
            return Some(Self { kernel: format!("tiles_bf16_{head_dim}"), config });
        }
        let name = match dtype {
            DType::BF16 => "bf16",
            // Many rows of f32 are faster as cuBLAS's products.
            DType::F32 if rows <= FEW => "f32",
            _ => return None,
        };
        let shared = 4 * (keys + head_dim + 2 * THREADS + THREADS / 32);
        let config = LaunchConfig {
            grid_dim: (rows as u32, groups as u32, 1),
            block_dim: (THREADS as u32, 1, 1),
            shared_mem_bytes: shared as u32,
        };
        (shared <= SHARED).then(|| Self { kernel: format!("few_{name}_{head_dim}"), config })
    }
}

/// Attention of the last `rows` of `keys` tokens: `q [batch · heads, rows, d]`, contiguous; `k` and `v`
/// `[batch · kv heads, keys, d]`, each head contiguous. Query head `h` reads key head `h · kv heads / heads`.
///
/// Returns the mixed values `[batch, rows, heads · d]` and the log-sum-exp of every row of scores `[batch · heads, rows]`
/// in f32, or `None` where no kernel fits: other types and head sizes than those of `attention.cu`, rows that do not lie
/// on 16 bytes, single rows of more than about 11,000 keys, gradients.
///
/// # Errors
/// What the driver says.
pub fn causal_attention([q, k, v]: [&Tensor; 3], batch: usize) -> Result<Option<(Tensor, Tensor)>> {
    let Device::Cuda(device) = q.device() else { return Ok(None) };
    let dtype = q.dtype();
    if [q, k, v].iter().any(|t| !t.device().same_device(q.device()) || t.dtype() != dtype || t.track_op()) {
        return Ok(None);
    }
    match dtype {
        DType::BF16 => run::<bf16>(device, [q, k, v], batch),
        DType::F32 => run::<f32>(device, [q, k, v], batch),
        _ => Ok(None),
    }
}

/// The distance between heads if every head is contiguous and lies on 16 bytes.
fn head_stride(layout: &Layout, size: usize) -> Option<usize> {
    let (&[_, _, columns], &[head, row, column]) = (layout.dims(), layout.stride()) else { return None };
    let aligned = |elements: usize| (elements * size).is_multiple_of(16);
    (column == 1 && row == columns && aligned(head) && aligned(layout.start_offset())).then_some(head)
}

#[allow(unsafe_code)]
fn run<T: CudaDType + WithDType + DeviceRepr>(
    device: &CudaDevice,
    [q, k, v]: [&Tensor; 3],
    batch: usize,
) -> Result<Option<(Tensor, Tensor)>> {
    let ((groups, rows, dim), (key_groups, keys, key_dim)) = (q.dims3()?, k.dims3()?);
    let (heads, kv_heads) = (groups / batch.max(1), key_groups / batch.max(1));
    let fitting = groups == batch * heads && key_groups == batch * kv_heads && key_dim == dim;
    if !fitting || kv_heads == 0 || heads % kv_heads != 0 || v.dims() != k.dims() {
        return Ok(None);
    }
    let Some(Plan { kernel, config }) = Plan::new(T::DTYPE, groups, rows, keys, dim) else { return Ok(None) };
    let q = q.contiguous()?;
    let ((q, q_layout), (k, k_layout), (v, v_layout)) =
        (q.storage_and_layout(), k.storage_and_layout(), v.storage_and_layout());
    let size = T::DTYPE.size_in_bytes();
    let [_, k_stride, v_stride] = match [q_layout, k_layout, v_layout].map(|layout| head_stride(layout, size))
    {
        [Some(q), Some(k), Some(v)] => [q, k, v],
        _ => return Ok(None),
    };
    let (Storage::Cuda(q), Storage::Cuda(k), Storage::Cuda(v)) = (&*q, &*k, &*v) else { return Ok(None) };
    let (q, k, v) = (from::<T>(q, q_layout)?, from::<T>(k, k_layout)?, from::<T>(v, v_layout)?);
    // SAFETY: both are written by the kernel before anything reads them: every row of every group has its block.
    let (out, lse) =
        unsafe { (device.alloc::<T>(groups * rows * dim)?, device.alloc::<f32>(groups * rows)?) };
    let function = device.get_or_load_custom_func(&kernel, "flmm_attention", PTX)?;
    let sizes = [heads, kv_heads, rows, keys].map(|size| size as i32);
    let strides = [k_stride, v_stride].map(|stride| stride as i64);
    let scale = (1.0 / (dim as f64).sqrt()) as f32;
    let mut launch = function.builder();
    launch.arg(&q).arg(&k).arg(&v).arg(&out).arg(&lse);
    for size in &sizes {
        launch.arg(size);
    }
    for stride in &strides {
        launch.arg(stride);
    }
    launch.arg(&scale);
    // SAFETY: the arguments are those of `attention.cu`'s kernels in type and order. The kernel reads `groups · rows · dim`
    // numbers of `q`, `key heads · keys · dim` of `k` and `v`, whose heads lie as their layouts say, and writes the two
    // buffers just made, of the sizes it expects. `Plan` gives each kernel the threads and the memory it is made for.
    unsafe { launch.launch(config) }.w()?;
    Ok(Some((wrap(out, device, (batch, rows, heads * dim)), wrap(lse, device, (groups, rows)))))
}

/// The elements from the first one of `layout` on.
fn from<'a, T: CudaDType>(storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, T>> {
    Ok(storage.as_cuda_slice::<T>()?.slice(layout.start_offset()..))
}

fn wrap<T: CudaDType>(slice: CudaSlice<T>, device: &CudaDevice, shape: impl Into<Shape>) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}
