// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"bytes"
	"unicode"
	"unicode/utf8"
)

const (
	wrongAddress = "the address may be that of a page about the image rather than of the image"
	wrongText    = "look into the file: the address may be that of an error message, a catalog or a list rather than of the image"
)

// textKind says what a file is that begins with head and is text, and what its owner
// can do about it. Both are empty for anything else. Text that somebody padded with
// zeros to whole sectors is still text.
func textKind(head []byte) (name, cure string) {
	text, _, _ := bytes.Cut(head, []byte{0})
	padding := head[len(text):]
	cut := len(text) == headSize // in the middle of a character, maybe
	text = bytes.TrimPrefix(text, []byte("\ufeff"))
	trimmed := bytes.TrimLeftFunc(text, unicode.IsSpace)
	start := bytes.ToLower(trimmed[:min(len(trimmed), 256)])
	begins := func(s string) bool { return bytes.HasPrefix(start, []byte(s)) }
	switch {
	case begins("<!doctype html"), begins("<html"):
		return "a web page (HTML)", wrongAddress
	case len(trimmed) == 0, len(bytes.Trim(padding, "\x00")) > 0, !printable(text, cut):
		return "", ""
	case begins("version https://git-lfs.github.com/spec/"):
		return "a git-lfs pointer: the disk's name and checksum, without its content", "fetch the content: git lfs pull"
	case begins("/annex/objects/"), begins("../.git/annex/objects/"), begins(".git/annex/objects/"):
		return "a git-annex pointer: the disk's name, without its content", "fetch the content: git annex get FILE"
	case begins("<?xml"), begins("<"):
		return "XML text", wrongText
	case begins("{"), begins("["):
		return "JSON text", wrongText
	case len(text)%SectorSize != 0, bytes.IndexByte(text, '\n') >= 0:
		return "text", wrongText
	}
	return "", "" // one line that fills whole sectors is no text that anybody writes
}

// printable reports whether text is UTF-8 without control characters, but for a
// character at its end that was cut off.
func printable(text []byte, cut bool) bool {
	for len(text) > 0 {
		c, size := utf8.DecodeRune(text)
		switch {
		case c == utf8.RuneError && size == 1:
			return cut && len(text) < utf8.UTFMax && !utf8.FullRune(text)
		case unicode.IsControl(c) && !bytes.ContainsRune([]byte("\t\n\v\f\r\x1b"), c):
			return false
		}
		text = text[size:]
	}
	return true
}
