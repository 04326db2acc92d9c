//! The stack machine that a pickle is a program for.

use std::collections::HashMap;

use super::{Global, Id, Pickle, Storage, TensorRef, Value};

/// More axes than any tensor of a model has.
const MAX_AXES: usize = 16;

/// The machine's state.
pub(super) struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Heights of the stack at the open marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

type Step<T> = Result<T, String>;

impl<'a> Machine<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, values: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() }
    }

    /// Runs the program to its end.
    pub(super) fn run(mut self) -> Step<Pickle> {
        match self.steps() {
            Ok(root) => Ok(Pickle { values: self.values, root }),
            Err(what) => Err(format!("{what} (at byte {} of data.pkl)", self.at)),
        }
    }

    fn steps(&mut self) -> Step<Id> {
        loop {
            let [opcode] = self.take()?;
            match opcode {
                b'.' => return self.pop(),
                0x80 => {
                    let [version] = self.take()?;
                    if version > 5 {
                        return Err(format!("pickle protocol {version} is not known"));
                    }
                }
                // Frame: a hint for buffered readers.
                0x95 => drop(self.take::<8>()?),
                b'(' => self.marks.push(self.stack.len()),
                b'0' => drop(self.pop()?),
                b'1' => drop(self.pop_to_mark()?),
                b'2' => self.stack.push(self.top()?),
                b'N' => self.push(Value::None),
                0x88 | 0x89 => self.push(Value::Bool),
                b'K' => {
                    let [byte] = self.take()?;
                    self.push(Value::Int(byte.into()));
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.take()?);
                    self.push(Value::Int(value.into()));
                }
                b'J' => {
                    let value = i32::from_le_bytes(self.take()?);
                    self.push(Value::Int(value.into()));
                }
                0x8a => self.long()?,
                b'G' => {
                    self.take::<8>()?;
                    self.push(Value::Float);
                }
                b'X' | b'T' => {
                    let length = u32::from_le_bytes(self.take()?);
                    self.text(length.into())?;
                }
                0x8c | b'U' => {
                    let [length] = self.take()?;
                    self.text(length.into())?;
                }
                0x8d => {
                    let length = u64::from_le_bytes(self.take()?);
                    self.text(length)?;
                }
                b')' => self.push(Value::Tuple(Vec::new())),
                b']' => self.push(Value::List(Vec::new())),
                b'}' => self.push(Value::Dict(Vec::new())),
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.push(Value::Tuple(items));
                }
                0x85..=0x87 => {
                    let count = usize::from(opcode - 0x84);
                    let mut items = (0..count).map(|_| self.pop()).collect::<Step<Vec<_>>>()?;
                    items.reverse();
                    self.push(Value::Tuple(items));
                }
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    let items = self.pop_to_mark()?;
                    self.append(items)?;
                }
                b's' => {
                    let value = self.pop()?;
                    let key = self.pop()?;
                    self.set_items(vec![key, value])?;
                }
                b'u' => {
                    let items = self.pop_to_mark()?;
                    self.set_items(items)?;
                }
                b'q' => {
                    let [index] = self.take()?;
                    self.memo.insert(index.into(), self.top()?);
                }
                b'r' => {
                    let index = u32::from_le_bytes(self.take()?);
                    self.memo.insert(index, self.top()?);
                }
                0x94 => {
                    let index = self.memo.len() as u32;
                    self.memo.insert(index, self.top()?);
                }
                b'h' => {
                    let [index] = self.take()?;
                    self.recall(index.into())?;
                }
                b'j' => {
                    let index = u32::from_le_bytes(self.take()?);
                    self.recall(index)?;
                }
                b'c' => {
                    let module = self.line()?;
                    let name = self.line()?;
                    self.global(&module, &name)?;
                }
                0x93 => {
                    let name = self.pop_text()?;
                    let module = self.pop_text()?;
                    self.global(&module, &name)?;
                }
                b'Q' => self.persistent_id()?,
                b'R' => self.reduce()?,
                b'b' => self.build()?,
                other => return Err(refused(other)),
            }
        }
    }

    fn take<const N: usize>(&mut self) -> Step<[u8; N]> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let chunk = rest.first_chunk::<N>().ok_or("the pickle ends too early")?;
        self.at += N;
        Ok(*chunk)
    }

    fn push(&mut self, value: Value) {
        // One value per opcode at most, and pickles are limited to far fewer bytes than 2^32.
        self.stack.push(self.values.len() as Id);
        self.values.push(value);
    }

    fn top(&self) -> Step<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("the pickle takes a value from an empty stack".into());
        }
        self.stack.last().copied().ok_or_else(|| "the pickle takes a value from an empty stack".into())
    }

    fn pop(&mut self) -> Step<Id> {
        let id = self.top()?;
        self.stack.pop();
        Ok(id)
    }

    fn pop_to_mark(&mut self) -> Step<Vec<Id>> {
        let mark = self.marks.pop().ok_or("the pickle closes a group that it never opened")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn get(&self, id: Id) -> &Value {
        self.values.get(id as usize).unwrap_or(&Value::None)
    }

    fn recall(&mut self, index: u32) -> Step<()> {
        let id = self
            .memo
            .get(&index)
            .ok_or_else(|| format!("the pickle recalls object {index}, which it never made"))?;
        self.stack.push(*id);
        Ok(())
    }

    /// An integer of up to eight bytes, two's complement.
    fn long(&mut self) -> Step<()> {
        let [length] = self.take()?;
        if length > 8 {
            return Err(format!("an integer of {length} bytes"));
        }
        let mut value = 0u64;
        let mut last = 0;
        for i in 0..length {
            let [byte] = self.take()?;
            value |= u64::from(byte) << (8 * i);
            last = byte;
        }
        if last & 0x80 != 0 && length < 8 {
            value |= u64::MAX << (8 * length);
        }
        self.push(Value::Int(value as i64));
        Ok(())
    }

    fn text(&mut self, length: u64) -> Step<()> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let length = usize::try_from(length).ok().filter(|&n| n <= rest.len());
        let length = length.ok_or("a text is longer than the rest of the pickle")?;
        let text = str::from_utf8(&rest[..length]).map_err(|_| "a text is not UTF-8")?;
        self.at += length;
        self.push(Value::Str(text.to_owned()));
        Ok(())
    }

    fn line(&mut self) -> Step<String> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let end = rest.iter().position(|&b| b == b'\n').ok_or("a name never ends")?;
        let text = str::from_utf8(&rest[..end]).map_err(|_| "a name is not UTF-8")?;
        self.at += end + 1;
        Ok(text.to_owned())
    }

    fn pop_text(&mut self) -> Step<String> {
        let id = self.pop()?;
        match self.get(id) {
            Value::Str(text) => Ok(text.clone()),
            _ => Err("a global's name is not a text".into()),
        }
    }

    fn append(&mut self, items: Vec<Id>) -> Step<()> {
        let list = self.top()?;
        match self.values.get_mut(list as usize) {
            Some(Value::List(list)) => list.extend(items),
            _ => return Err("the pickle appends to something that is not a list".into()),
        }
        Ok(())
    }

    fn set_items(&mut self, items: Vec<Id>) -> Step<()> {
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err("the pickle sets a dictionary key without a value".into());
        }
        let dict = self.top()?;
        match self.values.get_mut(dict as usize) {
            Some(Value::Dict(dict)) => dict.extend(pairs.iter().map(|&[key, value]| (key, value))),
            _ => return Err("the pickle sets a key of something that is not a dictionary".into()),
        }
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Step<()> {
        let global = Global::from_name(module, name).ok_or_else(|| {
            format!(
                "the pickle asks for the Python object `{module}.{name}`, which no tensor file needs; refused"
            )
        })?;
        self.push(Value::Global(global));
        Ok(())
    }

    /// `("storage", storage type, key, location, element count)` → a storage.
    fn persistent_id(&mut self) -> Step<()> {
        let id = self.pop()?;
        let parts = self.tuple(id, "a persistent id")?;
        let &[tag, element, key, _location, count] = parts.as_slice() else {
            return Err(format!("a persistent id has {} parts, expected 5", parts.len()));
        };
        let (Value::Str(tag), Value::Global(Global::Storage(element)), Value::Str(key)) =
            (self.get(tag), self.get(element), self.get(key))
        else {
            return Err("a persistent id is not (\"storage\", type, key, location, count)".into());
        };
        if tag != "storage" {
            return Err("a persistent id does not name a storage".into());
        }
        let count = self.size(count, "a storage's element count")?;
        let storage = Storage { element: *element, key: key.clone(), count };
        self.push(Value::Storage(storage));
        Ok(())
    }

    fn reduce(&mut self) -> Step<()> {
        let arguments = self.pop()?;
        let function = self.pop()?;
        let Value::Global(function) = *self.get(function) else {
            return Err("the pickle calls something that is not a function; refused".into());
        };
        let arguments = self.tuple(arguments, "a call's arguments")?;
        let value = match (function, arguments.as_slice()) {
            (Global::OrderedDict, []) => Value::Dict(Vec::new()),
            (Global::OrderedDict, &[items]) => self.dict_from_pairs(items)?,
            (Global::RebuildTensor, &[storage, offset, shape, strides, ..]) => {
                let Value::Storage(storage) = self.get(storage) else {
                    return Err("a tensor is not built from a storage".into());
                };
                Value::Tensor(TensorRef {
                    storage: storage.clone(),
                    offset: self.size(offset, "a tensor's offset")?,
                    shape: self.sizes(shape, "a tensor's shape")?,
                    strides: self.sizes(strides, "a tensor's strides")?,
                })
            }
            (Global::RebuildParameter, &[data, ..]) => match self.get(data) {
                Value::Tensor(tensor) => Value::Tensor(tensor.clone()),
                _ => return Err("a parameter is not built from a tensor".into()),
            },
            (function, arguments) => {
                return Err(format!("{function:?} is called with {} arguments; refused", arguments.len()));
            }
        };
        self.push(value);
        Ok(())
    }

    /// The state of an ordered dictionary is its `_metadata` (layer versions), of no use here.
    fn build(&mut self) -> Step<()> {
        let state = self.pop()?;
        let object = self.top()?;
        match (self.get(object), self.get(state)) {
            (Value::Dict(_), Value::Dict(_)) => Ok(()),
            _ => Err("the pickle sets the state of an object; refused".into()),
        }
    }

    fn dict_from_pairs(&self, items: Id) -> Step<Value> {
        let Value::List(items) = self.get(items) else {
            return Err("an ordered dictionary is not built from a list".into());
        };
        let pair = |&id: &Id| match self.get(id) {
            Value::Tuple(pair) | Value::List(pair) => match pair.as_slice() {
                &[key, value] => Ok((key, value)),
                _ => Err("an ordered dictionary's item is not a pair".to_owned()),
            },
            _ => Err("an ordered dictionary's item is not a pair".to_owned()),
        };
        Ok(Value::Dict(items.iter().map(pair).collect::<Step<_>>()?))
    }

    fn tuple(&self, id: Id, what: &str) -> Step<Vec<Id>> {
        match self.get(id) {
            // No call that is allowed has more than a few arguments.
            Value::Tuple(items) if items.len() <= MAX_AXES => Ok(items.clone()),
            Value::Tuple(items) => Err(format!("{what} has {} parts", items.len())),
            _ => Err(format!("{what} is not a tuple")),
        }
    }

    fn sizes(&self, id: Id, what: &str) -> Step<Vec<usize>> {
        self.tuple(id, what)?.into_iter().map(|id| self.size(id, what)).collect()
    }

    fn size(&self, id: Id, what: &str) -> Step<usize> {
        match self.get(id) {
            Value::Int(value) => usize::try_from(*value).map_err(|_| format!("{what} is {value}")),
            _ => Err(format!("{what} is not an integer")),
        }
    }
}

/// Why an opcode outside the list is refused.
fn refused(opcode: u8) -> String {
    let name = match opcode {
        b'i' => "INST",
        b'o' => "OBJ",
        0x81 => "NEWOBJ",
        0x92 => "NEWOBJ_EX",
        0x82..=0x84 => "EXT",
        b'P' => "PERSID",
        b'F' | b'I' | b'L' | b'S' | b'V' | b'g' | b'p' | b'd' | b'l' => "of protocol 0",
        0x8b => "LONG4",
        b'B' | b'C' | 0x8e | 0x96 => "for raw bytes",
        _ => "unknown",
    };
    format!("pickle opcode 0x{opcode:02x} ({name}) is not needed for tensors; refused")
}
