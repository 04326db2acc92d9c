//! Compiles the kernels to PTX, which the driver compiles for the device at hand.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/attention.cu");
    #[cfg(feature = "cuda")]
    cudaforge::KernelBuilder::new()
        .source_files(["src/attention.cu"])
        .args(["-std=c++17", "-O3"])
        .build_ptx()?;
    Ok(())
}
