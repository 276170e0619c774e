//! Where each tensor lies in the model's files, and reading it with every length checked first.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use kernels::{Format, Weight};
use sha2::{Digest, Sha256};

use crate::error::ModelError;

/// A tensor's place.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) format: Format,
    /// Outermost dimension first.
    pub(crate) shape: Vec<usize>,
    /// Index of the file.
    pub(crate) file: usize,
    /// Byte offset in the file.
    pub(crate) offset: u64,
}

/// All tensors of a model.
#[derive(Debug, Default)]
pub(crate) struct Tensors {
    pub(crate) files: Vec<(PathBuf, u64)>,
    pub(crate) places: HashMap<String, Place>,
}

impl Tensors {
    /// Adds a file; its index is the number of files before it.
    pub(crate) fn add_file(&mut self, path: &Path) -> Result<usize, ModelError> {
        let length = std::fs::metadata(path).map_err(|source| io(path, source))?.len();
        self.files.push((path.to_owned(), length));
        Ok(self.files.len() - 1)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// A matrix of shape (rows, cols).
    pub(crate) fn weight(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, ModelError> {
        self.reordered_weight(name, rows, cols, |row| row)
    }

    /// A matrix whose row `i` is row `order(i)` of the file's.
    pub(crate) fn reordered_weight(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
        order: impl Fn(usize) -> usize,
    ) -> Result<Weight, ModelError> {
        let (place, bytes) = self.read(name, &[rows, cols])?;
        Weight::reordered(place.format, rows, cols, bytes, order)
            .map_err(|e| ModelError::tensor(name, e.to_string()))
    }

    /// A vector, as float32.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let (place, bytes) = self.read(name, &[len])?;
        let row =
            Weight::new(place.format, 1, len, bytes).map_err(|e| ModelError::tensor(name, e.to_string()))?;
        let mut values = vec![0.0; len];
        row.decode_row(0, &mut values);
        Ok(values)
    }

    /// The vector, if the model has it.
    pub(crate) fn optional_vector(&self, name: &str, len: usize) -> Result<Option<Vec<f32>>, ModelError> {
        if self.has(name) { self.vector(name, len).map(Some) } else { Ok(None) }
    }

    fn read(&self, name: &str, shape: &[usize]) -> Result<(&Place, Vec<u8>), ModelError> {
        let place = self.places.get(name).ok_or_else(|| ModelError::tensor(name, "is missing"))?;
        if place.shape != shape {
            let problem = format!("has the shape {:?}; the config needs {shape:?}", place.shape);
            return Err(ModelError::tensor(name, problem));
        }
        let (path, length) = &self.files[place.file];
        let (rows, cols) = if let [rows, cols] = *shape { (rows, cols) } else { (1, shape[0]) };
        let bytes = place
            .format
            .row_bytes(cols)
            .ok()
            .and_then(|row| row.checked_mul(rows))
            .ok_or_else(|| ModelError::tensor(name, "does not divide into blocks of its format"))?;
        let end = place.offset.checked_add(bytes as u64);
        if end.is_none_or(|end| end > *length) {
            let problem = format!("tensor {name:?} ends beyond the end of the file: it is truncated");
            return Err(ModelError::Corrupt { path: path.clone(), problem });
        }
        let mut buffer = vec![0; bytes];
        let mut file = File::open(path).map_err(|source| io(path, source))?;
        file.seek(SeekFrom::Start(place.offset)).map_err(|source| io(path, source))?;
        file.read_exact(&mut buffer).map_err(|source| io(path, source))?;
        Ok((place, buffer))
    }

    /// SHA-256 over all files, in order.
    pub(crate) fn hash(&self) -> Result<[u8; 32], ModelError> {
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        for (path, length) in &self.files {
            hash.update(length.to_le_bytes());
            let mut file = File::open(path).map_err(|source| io(path, source))?;
            loop {
                match file.read(&mut buffer).map_err(|source| io(path, source))? {
                    0 => break,
                    read => hash.update(&buffer[..read]),
                }
            }
        }
        Ok(hash.finalize().into())
    }
}

/// An I/O error with its path.
pub(crate) fn io(path: &Path, source: std::io::Error) -> ModelError {
    ModelError::Io { path: path.to_owned(), source }
}
