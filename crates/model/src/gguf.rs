//! Reader of the GGUF container, version 2 and 3 (specification: `docs/gguf.md` of the ggml project).
//!
//! Every count and length is checked against the bytes that are left before anything of that size is
//! allocated, so a corrupt file is an error and never more.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use kernels::Format;

use crate::error::ModelError;
use crate::tensors::io;

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any unsigned or signed integer.
    Int(i128),
    /// Any float.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// Text.
    Text(String),
    /// A list of one type.
    List(Vec<Value>),
}

/// A tensor as the header describes it.
#[derive(Debug, Clone)]
pub struct TensorEntry {
    /// Its name.
    pub name: String,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    /// Its number format.
    pub format: Format,
    /// Byte offset in the file.
    pub offset: u64,
}

/// The header of a GGUF file.
#[derive(Debug)]
pub struct GgufFile {
    /// Metadata by key.
    pub metadata: HashMap<String, Value>,
    /// The tensors.
    pub tensors: Vec<TensorEntry>,
}

/// Lists within lists are allowed by the format; real files have none.
const MAX_NESTING: u32 = 2;

impl GgufFile {
    /// Reads the header of a file.
    ///
    /// # Errors
    /// When the file cannot be read or is corrupt; says what is wrong.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let file = File::open(path).map_err(|source| io(path, source))?;
        let length = file.metadata().map_err(|source| io(path, source))?.len();
        Self::read(BufReader::new(file), length)
            .map_err(|problem| ModelError::Corrupt { path: path.to_owned(), problem })
    }

    /// Reads a header from `length` bytes.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn read(source: impl Read, length: u64) -> Result<Self, String> {
        let mut reader = Header { source, length, at: 0 };
        if reader.array::<4>()? != *b"GGUF" {
            return Err("it does not begin with GGUF".into());
        }
        let version = reader.u32()?;
        if !matches!(version, 2 | 3) {
            return Err(format!("it is GGUF version {version}; 2 and 3 are supported"));
        }
        let tensor_count = reader.count(24, "tensors")?;
        let metadata_count = reader.count(13, "metadata entries")?;
        let mut metadata = HashMap::new();
        for _ in 0..metadata_count {
            let key = reader.text()?;
            let kind = reader.u32()?;
            let value = reader.value(kind, 0).map_err(|problem| format!("metadata {key:?}: {problem}"))?;
            metadata.insert(key, value);
        }
        let mut tensors = Vec::new();
        for _ in 0..tensor_count {
            tensors.push(reader.tensor()?);
        }
        let align = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Int(align)) if (1..=1 << 20).contains(align) => *align as u64,
            Some(_) => return Err("general.alignment is not a number from 1 to 1048576".into()),
        };
        let start = reader.at.next_multiple_of(align);
        for tensor in &mut tensors {
            let offset = start.checked_add(tensor.offset).filter(|offset| *offset <= length);
            tensor.offset = offset
                .ok_or_else(|| format!("tensor {:?} begins beyond the end of the file", tensor.name))?;
        }
        Ok(Self { metadata, tensors })
    }
}

struct Header<R> {
    source: R,
    length: u64,
    at: u64,
}

impl<R: Read> Header<R> {
    fn left(&self) -> u64 {
        self.length - self.at
    }

    fn bytes(&mut self, buffer: &mut [u8]) -> Result<(), String> {
        if buffer.len() as u64 > self.left() {
            return Err("the header is cut off".into());
        }
        self.source.read_exact(buffer).map_err(|error| error.to_string())?;
        self.at += buffer.len() as u64;
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut buffer = [0; N];
        self.bytes(&mut buffer)?;
        Ok(buffer)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    /// A number of entries of at least `size` bytes each.
    fn count(&mut self, size: u64, what: &str) -> Result<u64, String> {
        let count = self.u64()?;
        if count > self.left() / size {
            return Err(format!("it claims {count} {what}, more than the file can hold"));
        }
        Ok(count)
    }

    fn text(&mut self) -> Result<String, String> {
        let length = self.count(1, "bytes of text")?;
        let mut buffer = vec![0; length as usize];
        self.bytes(&mut buffer)?;
        String::from_utf8(buffer).map_err(|_| "a text is not valid UTF-8".into())
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<Value, String> {
        Ok(match kind {
            0 => Value::Int(self.array::<1>()?[0].into()),
            1 => Value::Int(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Int(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Int(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Int(self.u32()?.into()),
            5 => Value::Int(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 if depth < MAX_NESTING => {
                let kind = self.u32()?;
                let size = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    _ => 8,
                };
                let count = self.count(size, "list entries")?;
                let items = (0..count).map(|_| self.value(kind, depth + 1));
                Value::List(items.collect::<Result<_, _>>()?)
            }
            9 => return Err("lists are nested too deeply".into()),
            10 => Value::Int(self.u64()?.into()),
            11 => Value::Int(i64::from_le_bytes(self.array()?).into()),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("unknown value type {other}")),
        })
    }

    fn tensor(&mut self) -> Result<TensorEntry, String> {
        let name = self.text()?;
        let dimensions = self.u32()?;
        if !(1..=4).contains(&dimensions) {
            return Err(format!("tensor {name:?} has {dimensions} dimensions"));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = usize::try_from(self.u64()?).ok().filter(|size| *size > 0);
            shape.push(size.ok_or_else(|| format!("tensor {name:?} has an impossible size"))?);
        }
        shape.reverse();
        let format = match self.u32()? {
            0 => Format::F32,
            1 => Format::F16,
            2 => Format::Q4_0,
            3 => Format::Q4_1,
            8 => Format::Q8_0,
            12 => Format::Q4K,
            14 => Format::Q6K,
            30 => Format::Bf16,
            other => {
                return Err(format!(
                    "tensor {name:?} has the ggml type {other}; F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K and Q6_K are supported"
                ));
            }
        };
        let offset = self.u64()?;
        Ok(TensorEntry { name, shape, format, offset })
    }
}
