package protocol

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"hash/crc64"
	"io"

	"github.com/ulikunitz/xz/lzma"
)

// The container format xz is read here, and only the LZMA2 data in it by the
// library: the library's own reader of xz allocates the dictionary that a stream
// asks for, up to 4 GiB, before it has read anything. The index at the end of a
// stream says how large its blocks are, and no dictionary needs to be larger. A library
// with a limit for the dictionary would not do: Python asks for 8 MiB whatever the size
// of the text, so that a low limit refuses small messages and a high one costs 8 MiB for
// each.
//
// https://tukaani.org/xz/xz-file-format.txt describes the format.

var errXZ = errors.New("not an xz stream")

const (
	xzMagic       = "\xfd7zXZ\x00"
	xzFooterMagic = "YZ"
	// xzFrame is the size of a stream's header, and of its footer.
	xzFrame = 12
	// xzFilterLZMA2 is the only filter that Python's lzma uses unless asked.
	xzFilterLZMA2 = 0x21
)

// xzStream is a stream whose header, index and footer have been read.
type xzStream struct {
	blocks []byte // all blocks
	index  []byte // the records of the index
	count  uint64 // of records
	check  byte   // the type of check after each block
	size   uint64 // of the decompressed blocks
}

// decompressXZ decompresses one or more xz streams. It checks the sizes in their
// indexes before it decompresses anything.
func decompressXZ(body []byte, limit int) ([]byte, error) {
	var streams []xzStream // the last one first
	var size uint64
	for rest := body; len(rest) > 0; {
		s, before, err := lastXZStream(rest)
		if err != nil {
			return nil, err
		}
		if size += s.size; size > uint64(limit) {
			return nil, errTooLarge
		}
		streams, rest = append(streams, s), before
	}
	if len(streams) == 0 {
		return nil, errXZ
	}
	out := make([]byte, 0, size)
	for i := len(streams) - 1; i >= 0; i-- {
		var err error
		if out, err = streams[i].decompress(out); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// lastXZStream reads the frame of the last stream in a text, and returns what is
// before it.
func lastXZStream(text []byte) (s xzStream, before []byte, err error) {
	if len(text) < 2*xzFrame {
		return s, nil, errXZ
	}
	text, footer := text[:len(text)-xzFrame], text[len(text)-xzFrame:]
	if string(footer[10:]) != xzFooterMagic || binary.LittleEndian.Uint32(footer) != crc32.ChecksumIEEE(footer[4:10]) {
		return s, nil, errXZ
	}
	flags := footer[8:10]
	indexSize := (uint64(binary.LittleEndian.Uint32(footer[4:])) + 1) * 4
	if flags[0] != 0 || flags[1] > 15 || indexSize < 8 || indexSize > uint64(len(text)) {
		return s, nil, errXZ
	}
	s.check = flags[1]
	text, index := text[:uint64(len(text))-indexSize], text[uint64(len(text))-indexSize:]
	index, sum := index[:indexSize-4], index[indexSize-4:]
	if index[0] != 0 || binary.LittleEndian.Uint32(sum) != crc32.ChecksumIEEE(index) {
		return s, nil, errXZ
	}
	var ok bool
	if s.count, s.index, ok = xzNumber(index[1:]); !ok {
		return s, nil, errXZ
	}
	var stored uint64
	records := s.index
	for range s.count {
		var block, size uint64
		if block, size, records, ok = xzRecord(records); !ok || block > uint64(len(text)) {
			return s, nil, errXZ
		}
		stored += roundUp4(block)
		s.size += size
		if stored > uint64(len(text)) {
			return s, nil, errXZ
		}
		if s.size > 1<<62 {
			return s, nil, errTooLarge
		}
	}
	if stored+xzFrame > uint64(len(text)) {
		return s, nil, errXZ
	}
	text, s.blocks = text[:uint64(len(text))-stored], text[uint64(len(text))-stored:]
	before, header := text[:len(text)-xzFrame], text[len(text)-xzFrame:]
	if string(header[:6]) != xzMagic || !bytes.Equal(header[6:8], flags) || binary.LittleEndian.Uint32(header[8:]) != crc32.ChecksumIEEE(header[6:8]) {
		return s, nil, errXZ
	}
	return s, before, nil
}

// decompress appends the decompressed blocks.
func (s xzStream) decompress(out []byte) ([]byte, error) {
	blocks, records := s.blocks, s.index
	for range s.count {
		block, size, rest, _ := xzRecord(records)
		records = rest
		var err error
		if out, err = s.block(out, blocks[:roundUp4(block)], int(block), size); err != nil {
			return nil, err
		}
		blocks = blocks[roundUp4(block):]
	}
	return out, nil
}

// block appends a block that decompresses to size bytes. unpadded is its length
// without the padding, which stands before the check.
func (s xzStream) block(out, block []byte, unpadded int, size uint64) ([]byte, error) {
	checkSize := xzCheckSize(s.check)
	if len(block) == 0 || unpadded < (int(block[0])+1)*4+checkSize {
		return nil, errXZ
	}
	headerSize := (int(block[0]) + 1) * 4
	header, data, check := block[:headerSize], block[headerSize:unpadded-checkSize], block[len(block)-checkSize:]
	for _, b := range block[unpadded-checkSize : len(block)-checkSize] {
		if b != 0 {
			return nil, errXZ
		}
	}
	dictionary, err := xzDictionary(header)
	if err != nil {
		return nil, err
	}
	stream := bytes.NewReader(data)
	reader, err := lzma.Reader2Config{DictCap: int(min(dictionary, max(size, lzma.MinDictCap)))}.NewReader2(stream)
	if err != nil {
		return nil, err
	}
	start := len(out)
	out = out[:uint64(start)+size] // its capacity is that of all blocks
	if _, err := io.ReadFull(reader, out[start:]); err != nil {
		return nil, err
	}
	var more [1]byte
	if n, err := reader.Read(more[:]); n != 0 || err != io.EOF || stream.Len() != 0 {
		return nil, errXZ
	}
	return out, xzVerify(s.check, out[start:], check)
}

// xzDictionary reads a block's header and returns the size of the dictionary.
func xzDictionary(header []byte) (uint64, error) {
	n := len(header) - 4
	if n < 4 || binary.LittleEndian.Uint32(header[n:]) != crc32.ChecksumIEEE(header[:n]) {
		return 0, errXZ
	}
	flags, fields := header[1], header[2:n]
	for _, present := range []byte{0x40, 0x80} { // compressed size, decompressed size
		if flags&present != 0 {
			var ok bool
			if _, fields, ok = xzNumber(fields); !ok {
				return 0, errXZ
			}
		}
	}
	if flags&0x3F != 0 || len(fields) < 3 || fields[0] != xzFilterLZMA2 || fields[1] != 1 {
		return 0, errors.New("xz filters other than LZMA2 are not supported")
	}
	bits := fields[2]
	if bits > 40 {
		return 0, errXZ
	}
	return (2 | uint64(bits)&1) << (bits/2 + 11), nil
}

// xzRecord reads the size of a block and the size of what it decompresses to.
func xzRecord(text []byte) (block, size uint64, rest []byte, ok bool) {
	if block, rest, ok = xzNumber(text); ok {
		size, rest, ok = xzNumber(rest)
	}
	return block, size, rest, ok
}

func xzNumber(text []byte) (n uint64, rest []byte, ok bool) {
	n, length := binary.Uvarint(text)
	if length <= 0 || n > 1<<63-1 {
		return 0, nil, false
	}
	return n, text[length:], true
}

func roundUp4(n uint64) uint64 { return (n + 3) &^ 3 }

// xzCheckSize is the size of a check, known for all types of it.
func xzCheckSize(check byte) int {
	return []int{0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64}[check]
}

// xzVerify checks the three types that are in use. As the format says, data with
// another type is decompressed unchecked.
func xzVerify(check byte, data, want []byte) error {
	ok := true
	switch check {
	case 1:
		ok = crc32.ChecksumIEEE(data) == binary.LittleEndian.Uint32(want)
	case 4:
		ok = crc64.Checksum(data, xzTable) == binary.LittleEndian.Uint64(want)
	case 10:
		sum := sha256.Sum256(data)
		ok = bytes.Equal(sum[:], want)
	}
	if !ok {
		return errors.New("its checksum is wrong")
	}
	return nil
}

var xzTable = crc64.MakeTable(crc64.ECMA)
