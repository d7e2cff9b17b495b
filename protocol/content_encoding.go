package protocol

import (
	"bytes"
	"encoding/binary"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"golang.org/x/text/encoding/charmap"
)

// A textDecoder decodes text strictly, as Python's bytes.decode does: ok is
// false if any byte has no character in the encoding.
type textDecoder func(in []byte) (out []byte, ok bool)

// bodyText returns a body as UTF-8. As py-amqp does, it decodes the body as the
// property content_encoding says. Where that is not possible (the encoding is
// unknown, or a byte has no character in it), the body must be UTF-8
// (docs/celery.md#content-encoding).
func bodyText(body []byte, encoding string) (text []byte, ok bool) {
	if encoding == "utf-8" {
		return body, utf8.Valid(body) // as nearly always
	}
	if decode, known := textDecoders[encodingName(encoding)]; known {
		if text, ok := decode(body); ok {
			return text, true
		}
	}
	return body, utf8.Valid(body)
}

// encodingName normalizes a name as Python does: case does not matter, and
// neither does which characters separate its parts.
func encodingName(name string) string {
	parts := strings.FieldsFunc(strings.ToLower(name), func(r rune) bool {
		return r != '.' && (r < '0' || '9' < r) && (r < 'a' || 'z' < r)
	})
	return strings.Join(parts, "_")
}

// textDecoders has Python's normalized names and aliases. UTF-8 is not listed:
// it is what a body must be if its encoding is not here. Neither are encodings
// whose tables in golang.org/x/text differ from Python's.
var textDecoders = newTextDecoders()

func newTextDecoders() map[string]textDecoder {
	byName := map[string]textDecoder{}
	for _, d := range []struct {
		names  string
		decode textDecoder
	}{
		{"utf_8_sig", decodeUTF8Sig},
		{"utf_16 u16 utf16", decodeUTF16},
		{"utf_16_le utf_16le unicodelittleunmarked", utf16Decoder(binary.LittleEndian)},
		{"utf_16_be utf_16be unicodebigunmarked", utf16Decoder(binary.BigEndian)},
		{"utf_32 u32 utf32", decodeUTF32},
		{"utf_32_le utf_32le", utf32Decoder(binary.LittleEndian)},
		{"utf_32_be utf_32be", utf32Decoder(binary.BigEndian)},
		{"latin_1 8859 cp819 csisolatin1 ibm819 iso8859 iso8859_1 iso_8859_1 iso_8859_1_1987 iso_ir_100 l1 latin latin1", charmapDecoder(charmap.ISO8859_1)},
		{"iso8859_2 csisolatin2 iso_8859_2 iso_8859_2_1987 iso_ir_101 l2 latin2", charmapDecoder(charmap.ISO8859_2)},
		{"iso8859_3 csisolatin3 iso_8859_3 iso_8859_3_1988 iso_ir_109 l3 latin3", charmapDecoder(charmap.ISO8859_3)},
		{"iso8859_4 csisolatin4 iso_8859_4 iso_8859_4_1988 iso_ir_110 l4 latin4", charmapDecoder(charmap.ISO8859_4)},
		{"iso8859_5 csisolatincyrillic cyrillic iso_8859_5 iso_8859_5_1988 iso_ir_144", charmapDecoder(charmap.ISO8859_5)},
		{"iso8859_6 arabic asmo_708 csisolatinarabic ecma_114 iso_8859_6 iso_8859_6_1987 iso_ir_127", charmapDecoder(charmap.ISO8859_6)},
		{"iso8859_7 csisolatingreek ecma_118 elot_928 greek greek8 iso_8859_7 iso_8859_7_1987 iso_ir_126", charmapDecoder(charmap.ISO8859_7)},
		{"iso8859_8 csisolatinhebrew hebrew iso_8859_8 iso_8859_8_1988 iso_ir_138", charmapDecoder(charmap.ISO8859_8)},
		{"iso8859_9 csisolatin5 iso_8859_9 iso_8859_9_1989 iso_ir_148 l5 latin5", charmapDecoder(charmap.ISO8859_9)},
		{"iso8859_10 csisolatin6 iso_8859_10 iso_8859_10_1992 iso_ir_157 l6 latin6", charmapDecoder(charmap.ISO8859_10)},
		{"iso8859_13 iso_8859_13 l7 latin7", charmapDecoder(charmap.ISO8859_13)},
		{"iso8859_14 iso_8859_14 iso_8859_14_1998 iso_celtic iso_ir_199 l8 latin8", charmapDecoder(charmap.ISO8859_14)},
		{"iso8859_15 iso_8859_15 l9 latin9", charmapDecoder(charmap.ISO8859_15)},
		{"iso8859_16 iso_8859_16 iso_8859_16_2001 iso_ir_226 l10 latin10", charmapDecoder(charmap.ISO8859_16)},
		{"cp1250 1250 windows_1250", charmapDecoder(charmap.Windows1250)},
		{"cp1251 1251 windows_1251", charmapDecoder(charmap.Windows1251)},
		{"cp1252 1252 windows_1252", charmapDecoder(charmap.Windows1252)},
		{"cp1253 1253 windows_1253", charmapDecoder(charmap.Windows1253)},
		{"cp1254 1254 windows_1254", charmapDecoder(charmap.Windows1254)},
		{"cp1256 1256 windows_1256", charmapDecoder(charmap.Windows1256)},
		{"cp1257 1257 windows_1257", charmapDecoder(charmap.Windows1257)},
		{"cp1258 1258 windows_1258", charmapDecoder(charmap.Windows1258)},
		{"cp437 437 cspc8codepage437 ibm437", charmapDecoder(charmap.CodePage437)},
		{"cp850 850 cspc850multilingual ibm850", charmapDecoder(charmap.CodePage850)},
		{"cp852 852 cspcp852 ibm852", charmapDecoder(charmap.CodePage852)},
		{"cp858 858 csibm858 ibm858", charmapDecoder(charmap.CodePage858)},
		{"cp866 866 csibm866 ibm866", charmapDecoder(charmap.CodePage866)},
		{"cp037 037 csibm037 ebcdic_cp_ca ebcdic_cp_nl ebcdic_cp_us ebcdic_cp_wt ibm037 ibm039", charmapDecoder(charmap.CodePage037)},
		{"cp1140 1140 ibm1140", charmapDecoder(charmap.CodePage1140)},
		{"koi8_r cskoi8r", charmapDecoder(charmap.KOI8R)},
		{"mac_roman macintosh macroman", charmapDecoder(charmap.Macintosh)},
		{"mac_cyrillic maccyrillic", charmapDecoder(charmap.MacintoshCyrillic)},
	} {
		for name := range strings.FieldsSeq(d.names) {
			byName[name] = d.decode
		}
	}
	return byName
}

func decodeUTF8Sig(in []byte) ([]byte, bool) {
	out := bytes.TrimPrefix(in, []byte("\ufeff"))
	return out, utf8.Valid(out)
}

// decodeUTF16 reads little endian where there is no byte order mark, as Python
// does on all usual processors. RFC 2781 would have big endian.
func decodeUTF16(in []byte) ([]byte, bool) {
	if rest, marked := bytes.CutPrefix(in, []byte{0xFE, 0xFF}); marked {
		return utf16Decoder(binary.BigEndian)(rest)
	}
	return utf16Decoder(binary.LittleEndian)(bytes.TrimPrefix(in, []byte{0xFF, 0xFE}))
}

func utf16Decoder(order binary.ByteOrder) textDecoder {
	return func(in []byte) ([]byte, bool) {
		if len(in)%2 != 0 {
			return nil, false
		}
		out := make([]byte, 0, len(in))
		for ; len(in) > 0; in = in[2:] {
			r := rune(order.Uint16(in))
			if utf16.IsSurrogate(r) {
				if len(in) < 4 {
					return nil, false
				}
				in = in[2:]
				if r = utf16.DecodeRune(r, rune(order.Uint16(in))); r == utf8.RuneError {
					return nil, false
				}
			}
			out = utf8.AppendRune(out, r)
		}
		return out, true
	}
}

// decodeUTF32 reads little endian where there is no byte order mark.
func decodeUTF32(in []byte) ([]byte, bool) {
	if rest, marked := bytes.CutPrefix(in, []byte{0, 0, 0xFE, 0xFF}); marked {
		return utf32Decoder(binary.BigEndian)(rest)
	}
	return utf32Decoder(binary.LittleEndian)(bytes.TrimPrefix(in, []byte{0xFF, 0xFE, 0, 0}))
}

func utf32Decoder(order binary.ByteOrder) textDecoder {
	return func(in []byte) ([]byte, bool) {
		if len(in)%4 != 0 {
			return nil, false
		}
		out := make([]byte, 0, len(in)/4)
		for ; len(in) > 0; in = in[4:] {
			r := order.Uint32(in)
			if r > utf8.MaxRune || utf16.IsSurrogate(rune(r)) {
				return nil, false
			}
			out = utf8.AppendRune(out, rune(r))
		}
		return out, true
	}
}

// charmapDecoder returns the decoder of an encoding of one byte per character.
// The tables of ISO 8859 in golang.org/x/text lack the control characters 0x80
// to 0x9F, which Python has.
func charmapDecoder(table *charmap.Charmap) textDecoder {
	isISO := strings.HasPrefix(table.String(), "ISO 8859")
	return func(in []byte) ([]byte, bool) {
		out := make([]byte, 0, len(in))
		for _, b := range in {
			r := table.DecodeByte(b)
			switch {
			case r != utf8.RuneError:
			case isISO && 0x80 <= b && b <= 0x9F:
				r = rune(b)
			default:
				return nil, false
			}
			out = utf8.AppendRune(out, r)
		}
		return out, true
	}
}
