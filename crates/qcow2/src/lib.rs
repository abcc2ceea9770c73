//! The QCOW2 on-disk format alone: parse, validate, encode. No I/O, no unsafe.
