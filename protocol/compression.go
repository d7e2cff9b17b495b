package protocol

import (
	"bytes"
	"compress/bzip2"
	"compress/zlib"
	"errors"
	"fmt"
	"io"

	"github.com/andybalholm/brotli"
	"github.com/klauspost/compress/zstd"
)

// MaxBodySize is the limit on a decompressed body, in bytes. A message whose
// body is larger is malformed ([ReasonCompression]), so that a small message
// cannot exhaust memory.
const MaxBodySize = 64 << 20

// A compressed body may be MaxExpansion times its compressed size, or
// SmallBodySize if that is more, and never more than [MaxBodySize]. What is larger
// is malformed ([ReasonCompression]): Celery has no limit, and 8 KiB of bzip2 can
// contain gigabytes. JSON that people send is rarely compressed to a hundredth.
const (
	MaxExpansion  = 200
	SmallBodySize = 1 << 20
)

// maxZstdWindow is the largest window that Python's zstd accepts.
const maxZstdWindow = 128 << 20

func isCompressed(d Delivery) bool {
	name := d.Headers["compression"]
	return name != nil && name != ""
}

// errTooLarge says that a body decompresses to more than its limit.
var errTooLarge = errors.New("too large")

// The standard library lacks lzma, Brotli and Zstandard; the three libraries for them are
// those that most Go programs use. That for Brotli imports net/http, for a helper that
// is not used here. It adds nothing to a worker or a client, in which the library for
// metrics needs net/http anyway; a program with this package alone becomes about 2 MB
// larger. Without it, producers with compression="brotli" would have no workers in Go.

// decompress decompresses the body as the header compression says, with all
// methods and names of kombu (docs/celery.md#body). The type application/x-gzip
// is a zlib stream (RFC 1950); a real gzip file is refused, as in Python. A
// result of more than limit bytes is an error, and so is one that exceeds
// [MaxExpansion] and [SmallBodySize].
//
// A decompressor holds, beside the result, at most what its format needs: 4 MB
// for bzip2, the window of at most 16 MiB for Brotli. For xz and zstd it is no
// more than the result, whatever a message says about itself.
func decompress(d Delivery, limit int) ([]byte, error) {
	name := d.Headers["compression"]
	if !isCompressed(d) {
		if len(d.Body) > limit {
			return nil, fmt.Errorf("%d bytes are more than %d", len(d.Body), limit)
		}
		return d.Body, nil
	}
	limit = min(limit, max(SmallBodySize, MaxExpansion*len(d.Body)))
	var body []byte
	var err error
	switch name {
	case "application/x-gzip", "gzip", "zlib":
		z, failed := zlib.NewReader(bytes.NewReader(d.Body))
		if failed != nil {
			return nil, fmt.Errorf("not a zlib stream: %w", failed)
		}
		body, err = readLimited(z, limit)
	case "application/x-bz2", "bzip2", "bzip":
		body, err = readLimited(bzip2.NewReader(bytes.NewReader(d.Body)), limit)
	case "application/x-lzma", "lzma", "xz":
		body, err = decompressXZ(d.Body, limit)
	case "application/x-brotli", "brotli":
		body, err = readLimited(brotli.NewReader(bytes.NewReader(d.Body)), limit)
	case "application/zstd", "zstd", "zstandard":
		body, err = decompressZstd(d.Body, limit)
	default:
		return nil, fmt.Errorf("compression %s is none of zlib, bzip2, lzma, brotli and zstd", quote(truncate(fmt.Sprint(name), 60)))
	}
	switch {
	case errors.Is(err, errTooLarge):
		return nil, fmt.Errorf("%d bytes decompress to more than %d", len(d.Body), limit)
	case err != nil:
		return nil, fmt.Errorf("corrupt stream: %w", err)
	}
	return body, nil
}

func readLimited(stream io.Reader, limit int) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(stream, int64(limit)+1))
	if err == nil && len(body) > limit {
		err = errTooLarge
	}
	return body, err
}

// decompressZstd decompresses into a slice of fixed capacity: that is the library's
// only limit that does not also refuse small texts whose producer has chosen a
// large window.
func decompressZstd(body []byte, limit int) ([]byte, error) {
	decoder, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
	if err != nil {
		return nil, err
	}
	defer decoder.Close()
	size := limit
	var header zstd.Header
	if header.Decode(body) == nil && header.HasFCS {
		if header.FrameContentSize > uint64(limit) {
			return nil, errTooLarge
		}
		size = int(header.FrameContentSize)
	}
	out, err := decoder.DecodeAll(body, make([]byte, 0, size))
	if errors.Is(err, zstd.ErrDecoderSizeExceeded) && size < limit {
		// There are more frames than the one whose size is known.
		out, err = decoder.DecodeAll(body, make([]byte, 0, limit))
	}
	if errors.Is(err, zstd.ErrDecoderSizeExceeded) {
		err = errTooLarge
	}
	return out, err
}
