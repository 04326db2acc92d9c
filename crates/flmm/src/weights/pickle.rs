//! A reader for the few pickles that describe tensors. Nothing is executed and nothing is imported.
//!
//! A pickle is a program for a stack machine, and Python's own reader lets that program call anything. This
//! reader knows only the opcodes that `torch.save` needs for dictionaries of tensors (protocols 2 to 5) and the
//! globals listed in [`Global::from_name`]; whatever else appears is refused by name. Values live in one arena
//! and refer to one another by index, so that neither deep nesting nor shared objects can exhaust the stack or
//! the memory: the arena never has more values than the pickle has bytes.

mod machine;

use super::element::Element;
use machine::Machine;

/// Index of a value in [`Pickle::values`].
pub(super) type Id = u32;

/// What a pickle described.
pub(super) struct Pickle {
    pub(super) values: Vec<Value>,
    pub(super) root: Id,
}

/// One value of the pickle.
#[derive(Debug, Clone)]
pub(super) enum Value {
    None,
    /// `requires_grad` and the like: frozen or trainable is not the file's to say.
    Bool,
    Int(i64),
    /// Learning rates and the like: allowed in a file, of no use here.
    Float,
    Str(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(Storage),
    Tensor(TensorRef),
}

/// A record of the archive, as a persistent id names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Storage {
    pub(super) element: Element,
    /// The record's name below `data/`.
    pub(super) key: String,
    /// Number of elements that the pickle claims.
    pub(super) count: usize,
}

/// A view into a storage; lengths in elements, not yet checked against the storage.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct TensorRef {
    pub(super) storage: Storage,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

/// The only Python objects that a pickle may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Global {
    OrderedDict,
    /// `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])`
    /// and its predecessor `_rebuild_tensor(storage, offset, size, stride)`.
    RebuildTensor,
    /// `torch._utils._rebuild_parameter(tensor, requires_grad, hooks)`
    RebuildParameter,
    Storage(Element),
}

impl Global {
    fn from_name(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "FloatStorage") => Self::Storage(Element::F32),
            ("torch", "HalfStorage") => Self::Storage(Element::F16),
            ("torch", "BFloat16Storage") => Self::Storage(Element::BF16),
            ("torch", "DoubleStorage") => Self::Storage(Element::F64),
            ("torch", "LongStorage") => Self::Storage(Element::I64),
            ("torch", "IntStorage") => Self::Storage(Element::I32),
            ("torch", "ShortStorage") => Self::Storage(Element::I16),
            ("torch", "CharStorage") => Self::Storage(Element::I8),
            ("torch", "ByteStorage") => Self::Storage(Element::U8),
            ("torch", "BoolStorage") => Self::Storage(Element::Bool),
            _ => return None,
        })
    }
}

impl Pickle {
    /// Runs the pickle in `bytes`. An error is one sentence for the user.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, String> {
        Machine::new(bytes).run()
    }

    /// The value `id`; every id in the arena is valid.
    pub(super) fn value(&self, id: Id) -> &Value {
        self.values.get(id as usize).unwrap_or(&Value::None)
    }
}
