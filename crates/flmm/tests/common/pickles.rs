//! Writing pickles and PyTorch's archives by hand, the way `torch.save` does and the way attackers would.
#![allow(dead_code)] // Every test program uses its own part of it.

use std::io::Write;

use zip::write::SimpleFileOptions;

/// Opcodes as bytes, put together by the functions below.
pub(crate) type Ops = Vec<u8>;

pub(crate) fn text(s: &str) -> Ops {
    [b"X", &(s.len() as u32).to_le_bytes()[..], s.as_bytes()].concat()
}

pub(crate) fn int(i: i64) -> Ops {
    match i32::try_from(i) {
        Ok(small) => [b"J", &small.to_le_bytes()[..]].concat(),
        Err(_) => [&[0x8a, 8], &i.to_le_bytes()[..]].concat(),
    }
}

pub(crate) fn global(module: &str, name: &str) -> Ops {
    format!("c{module}\n{name}\n").into_bytes()
}

pub(crate) fn tuple(items: &[Ops]) -> Ops {
    [b"(".to_vec(), items.concat(), b"t".to_vec()].concat()
}

pub(crate) fn ints(values: &[i64]) -> Ops {
    tuple(&values.iter().map(|&i| int(i)).collect::<Vec<_>>())
}

pub(crate) fn call(function: Ops, arguments: &[Ops]) -> Ops {
    [function, tuple(arguments), b"R".to_vec()].concat()
}

pub(crate) fn storage(kind: &str, key: &str, count: i64) -> Ops {
    let parts = [text("storage"), global("torch", kind), text(key), text("cpu"), int(count)];
    [tuple(&parts), b"Q".to_vec()].concat()
}

pub(crate) fn ordered_dict() -> Ops {
    [global("collections", "OrderedDict"), b")R".to_vec()].concat()
}

pub(crate) fn tensor(storage: Ops, offset: i64, shape: &[i64], strides: &[i64]) -> Ops {
    let arguments = [storage, int(offset), ints(shape), ints(strides), vec![0x89], ordered_dict()];
    call(global("torch._utils", "_rebuild_tensor_v2"), &arguments)
}

pub(crate) fn dict(items: &[(&str, Ops)]) -> Ops {
    let items: Vec<Ops> = items.iter().map(|(key, value)| [text(key), value.clone()].concat()).collect();
    [b"}(".to_vec(), items.concat(), b"u".to_vec()].concat()
}

pub(crate) fn pickle(root: Ops) -> Ops {
    [vec![0x80, 2], root, b".".to_vec()].concat()
}

pub(crate) fn archive(pickle: &[u8], records: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut add = |name: &str, content: &[u8]| {
        zip.start_file(format!("archive/{name}"), options).unwrap();
        zip.write_all(content).unwrap();
    };
    add("data.pkl", pickle);
    add("byteorder", b"little");
    for (name, content) in records {
        add(&format!("data/{name}"), content);
    }
    zip.finish().unwrap().into_inner()
}

pub(crate) fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub(crate) fn counting(n: usize) -> Vec<u8> {
    floats(&(0..n).map(|i| i as f32).collect::<Vec<_>>())
}

/// A checkpoint as `torch.save` writes a state dictionary: every tensor (name, shape, bytes) of type `kind` with a
/// storage of its own, the dictionary below the keys `nested`.
pub(crate) fn checkpoint(kind: &str, tensors: &[(&str, Vec<usize>, Vec<u8>)], nested: &[&str]) -> Vec<u8> {
    let views = tensors.iter().enumerate().map(|(i, (name, shape, _))| {
        let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        let strides: Vec<i64> = (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect();
        let count = shape.iter().product();
        (*name, tensor(storage(kind, &i.to_string(), count), 0, &shape, &strides))
    });
    let mut root = dict(&views.collect::<Vec<_>>());
    for key in nested.iter().rev() {
        root = dict(&[(*key, root), ("epoch", int(3))]);
    }
    let keys: Vec<String> = (0..tensors.len()).map(|i| i.to_string()).collect();
    let records: Vec<(&str, Vec<u8>)> =
        keys.iter().zip(tensors).map(|(key, (.., bytes))| (key.as_str(), bytes.clone())).collect();
    archive(&pickle(root), &records)
}
