//! A CUDA compiler in `target/cuda` from the packages on PyPI, for machines without a toolkit.
//!
//! `pip` downloads the packages and checks what their index says of them; the wheels' SHA-256 is checked here as well,
//! so that everybody builds with the same files. They hold nvcc, its headers and the CUDA runtime, but not what candle
//! links: the driver, cuBLAS, cuRAND, NVRTC and NCCL. For those, static libraries are made whose functions load the real
//! library when they are first called. The program then starts on machines that have none of them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

/// Package, version, and the SHA-256 of its wheel for Linux on x86-64.
const PACKAGES: [(&str, &str, &str); 6] = [
    ("nvidia-cuda-nvcc", "13.0.88", "56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03"),
    ("nvidia-nvvm", "13.0.88", "c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0"),
    ("nvidia-cuda-crt", "13.0.88", "2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4"),
    ("nvidia-cuda-cccl", "13.0.85", "e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649"),
    ("nvidia-cuda-runtime", "13.0.96", "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548"),
    ("nvidia-curand", "10.4.0.35", "1aee33a5da6e1db083fe2b90082def8915f30f3248d5896bcec36a579d941bfc"),
];

/// A library that is loaded when it is first needed: its name, the file, the module of cudarc that declares its functions,
/// and what they return when it is not there, a code of the library's own.
const LOADED: [(&str, &str, &str, u32); 6] = [
    ("cuda", "libcuda.so.1", "driver", 100),
    ("cublas", "libcublas.so.13", "cublas", 1),
    ("cublasLt", "libcublasLt.so.13", "cublaslt", 1),
    ("curand", "libcurand.so.10", "curand", 101),
    ("nvrtc", "libnvrtc.so.13", "nvrtc", 11),
    ("nccl", "libnccl.so.2", "nccl", 2),
];

/// Makes the toolkit in `target/cuda`, unless it is there, and prints what to export.
pub(crate) fn run() -> Result<()> {
    ensure!(
        cfg!(all(target_os = "linux", target_arch = "x86_64")),
        "the packages are for Linux on x86-64; install NVIDIA's toolkit instead (docs/cuda.md)"
    );
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
    let (toolkit, half) = (root.join("target/cuda"), root.join("target/cuda.part"));
    let mark = PACKAGES.map(|(name, version, sum)| format!("{name} {version} {sum}\n")).concat();
    if fs::read_to_string(toolkit.join("packages")).is_ok_and(|found| found == mark) {
        eprintln!("{} is complete", toolkit.display());
    } else {
        // What an interrupted run has left.
        remove(&half)?;
        let wheels = half.join("wheels");
        fs::create_dir_all(&wheels)?;
        download(&wheels)?;
        unpack(&wheels, &half)?;
        link_libraries(&root, &half)?;
        fs::remove_dir_all(&wheels)?;
        fs::write(half.join("packages"), mark)?;
        remove(&toolkit)?;
        fs::rename(&half, &toolkit)?;
    }
    let toolkit = toolkit.display();
    println!("export CUDA_HOME={toolkit} NVCC={toolkit}/bin/nvcc PATH={toolkit}/bin:$PATH");
    println!(
        "export CUDA_COMPUTE_CAP=${{CUDA_COMPUTE_CAP:-80}} # 80: A100, 86: RTX 30, 89: RTX 40, 90: H100"
    );
    Ok(())
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// The wheels, each checked against its sum.
fn download(wheels: &Path) -> Result<()> {
    for (name, version, sum) in PACKAGES {
        eprintln!("{name} {version}");
        let package = format!("{name}=={version}");
        let status = Command::new("python3")
            .args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest"])
            .arg(wheels)
            .arg(&package)
            .status()
            .context("cannot run python3: pip downloads the packages")?;
        ensure!(status.success(), "pip could not download {package}");
        let prefix = format!("{}-{version}-", name.replace('-', "_"));
        let wheel = files(wheels)?
            .into_iter()
            .find(|file| file.file_name().is_some_and(|file| file.to_string_lossy().starts_with(&prefix)))
            .with_context(|| format!("pip has downloaded no {prefix}*.whl"))?;
        let found = flmm::hex(Sha256::digest(fs::read(&wheel)?));
        ensure!(found == sum, "{}: SHA-256 {found}, expected {sum}", wheel.display());
    }
    Ok(())
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}

/// What the wheels have below `nvidia/cu13`, in `to`.
fn unpack(wheels: &Path, to: &Path) -> Result<()> {
    for wheel in files(wheels)? {
        let mut archive = zip::ZipArchive::new(fs::File::open(&wheel)?)?;
        for index in 0..archive.len() {
            let mut entry = archive.by_index(index)?;
            let Some(path) = entry.enclosed_name() else {
                bail!("{}: a path leads outside", wheel.display())
            };
            let Ok(inside) = path.strip_prefix("nvidia/cu13") else { continue };
            if entry.is_dir() {
                continue;
            }
            let path = to.join(inside);
            fs::create_dir_all(path.parent().context("a file without a folder")?)?;
            std::io::copy(&mut entry, &mut fs::File::create(&path)?)?;
            #[cfg(unix)]
            if inside.components().any(|part| part.as_os_str() == "bin") {
                use std::os::unix::fs::PermissionsExt;
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
            }
        }
    }
    Ok(())
}

/// Libraries for the linker, in `lib`.
fn link_libraries(root: &Path, toolkit: &Path) -> Result<()> {
    let lib = toolkit.join("lib");
    // The runtime itself, which looks for the driver when it is first called.
    fs::copy(lib.join("libcudart_static.a"), lib.join("libcudart.a"))?;
    // The static runtime brings its own; the shared libraries would come first.
    for file in files(&lib)? {
        if file.to_string_lossy().contains(".so") {
            fs::remove_file(file)?;
        }
    }
    let cudarc = cudarc(root)?;
    for (name, file, module, missing) in LOADED {
        let declared = fs::read_to_string(cudarc.join("src").join(module).join("sys/mod.rs"))?;
        let source = lib.join(format!("{name}.S"));
        fs::write(&source, stub(name, file, &functions(&declared), missing))?;
        let object = lib.join(format!("{name}.o"));
        tool(Command::new("cc").args(["-c", "-fPIC"]).arg(&source).arg("-o").arg(&object))?;
        tool(Command::new("ar").arg("crs").arg(lib.join(format!("lib{name}.a"))).arg(&object))?;
        fs::remove_file(source)?;
        fs::remove_file(object)?;
    }
    Ok(())
}

fn tool(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    ensure!(status.success(), "{command:?} failed");
    Ok(())
}

/// The folder of the crate that declares the libraries' functions.
fn cudarc(root: &Path) -> Result<PathBuf> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--all-features"])
        .current_dir(root)
        .output()?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().context("cargo metadata has no packages")?;
    let manifest = packages.iter().find(|package| package["name"] == "cudarc");
    let manifest = manifest.and_then(|package| package["manifest_path"].as_str());
    Ok(Path::new(manifest.context("no crate cudarc")?).parent().context("no folder")?.to_owned())
}

/// Names of the functions that `source` declares as foreign: `fn name(` on the line behind `extern "C" {`.
fn functions(source: &str) -> BTreeSet<&str> {
    let mut lines = source.lines();
    let mut names = BTreeSet::new();
    while let Some(line) = lines.next() {
        if line.trim() == "extern \"C\" {"
            && let Some((name, _)) =
                lines.next().unwrap_or_default().trim().trim_start_matches("pub ").split_once('(')
            && let Some(name) = name.strip_prefix("fn ")
        {
            names.insert(name);
        }
    }
    names
}

/// Assembly (x86-64, System V) in which every function jumps to the one of its name in `file`, looked up at its first
/// call; without it, the function returns `missing`.
fn stub(library: &str, file: &str, functions: &BTreeSet<&str>, missing: u32) -> String {
    let mut text = format!(
        r#"    .section .note.GNU-stack,"",@progbits
    .local {library}_handle
    .comm {library}_handle, 8, 8
    .section .rodata
{library}_file: .asciz "{file}"
    .text
# r11: name, r10: where its address is kept. All registers that may hold arguments are kept.
{library}_find:
    push %rbp
    mov %rsp, %rbp
    push %rdi
    push %rsi
    push %rdx
    push %rcx
    push %r8
    push %r9
    push %rax
    push %r10
    push %r11
    sub $136, %rsp
    movdqu %xmm0, (%rsp)
    movdqu %xmm1, 16(%rsp)
    movdqu %xmm2, 32(%rsp)
    movdqu %xmm3, 48(%rsp)
    movdqu %xmm4, 64(%rsp)
    movdqu %xmm5, 80(%rsp)
    movdqu %xmm6, 96(%rsp)
    movdqu %xmm7, 112(%rsp)
    mov {library}_handle(%rip), %rdi
    test %rdi, %rdi
    jnz 1f
    lea {library}_file(%rip), %rdi
    mov $0x102, %esi # RTLD_NOW | RTLD_GLOBAL
    call dlopen@PLT
    mov %rax, {library}_handle(%rip)
    mov %rax, %rdi
    test %rax, %rax
    jz 2f
1:  mov -72(%rbp), %rsi
    call dlsym@PLT
    test %rax, %rax
    jnz 3f
2:  lea {library}_missing(%rip), %rax
3:  mov -64(%rbp), %r10
    mov %rax, (%r10)
    movdqu (%rsp), %xmm0
    movdqu 16(%rsp), %xmm1
    movdqu 32(%rsp), %xmm2
    movdqu 48(%rsp), %xmm3
    movdqu 64(%rsp), %xmm4
    movdqu 80(%rsp), %xmm5
    movdqu 96(%rsp), %xmm6
    movdqu 112(%rsp), %xmm7
    add $136, %rsp
    pop %r11
    pop %r10
    pop %rax
    pop %r9
    pop %r8
    pop %rcx
    pop %rdx
    pop %rsi
    pop %rdi
    pop %rbp
    jmp *(%r10)
{library}_missing:
    mov ${missing}, %eax
    ret
"#
    );
    for name in functions {
        let _ = write!(
            text,
            r#"    .section .rodata
.Lname_{name}: .asciz "{name}"
    .local address_{name}
    .comm address_{name}, 8, 8
    .text
    .globl {name}
    .type {name}, @function
{name}:
    mov address_{name}(%rip), %r11
    test %r11, %r11
    jz 1f
    jmp *%r11
1:  lea .Lname_{name}(%rip), %r11
    lea address_{name}(%rip), %r10
    jmp {library}_find
"#
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_those_declared_as_foreign() {
        let source =
            "pub unsafe fn a(x: i32) -> R {\n extern \"C\" {\n fn a(x: i32) -> R;\n }\n}\nfn b() {}\n";
        assert_eq!(functions(source).into_iter().collect::<Vec<_>>(), ["a"]);
    }

    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    #[test]
    fn functions_are_found_when_they_are_called_or_give_their_code() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let compile =
            |arguments: &[&str]| tool(Command::new("cc").current_dir(&folder).args(arguments)).unwrap();
        fs::write(path("real.c"), "double sum(int a, double b, int c) { return a + b + c; }").unwrap();
        compile(&["-shared", "-fPIC", "real.c", "-o", "real.so"]);
        let real = path("real.so");
        fs::write(path("there.S"), stub("there", real.to_str().unwrap(), &["sum", "lacking"].into(), 7))
            .unwrap();
        fs::write(path("gone.S"), stub("gone", "libof-no-machine.so.0", &["gone_fn"].into(), 9)).unwrap();
        let program = "double sum(int, double, int); int lacking(void), gone_fn(void);
            int main(void) {
                int i; for (i = 0; i < 2; i++) if (sum(1, 2.5, 3) != 6.5) return 1;
                for (i = 0; i < 2; i++) if (lacking() != 7 || gone_fn() != 9) return 2;
                return 0;
            }";
        fs::write(path("main.c"), program).unwrap();
        compile(&["main.c", "there.S", "gone.S", "-o", "main", "-ldl"]);
        assert_eq!(Command::new(path("main")).status().unwrap().code(), Some(0));
    }
}
