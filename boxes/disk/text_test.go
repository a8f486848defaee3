// SPDX-License-Identifier: Apache-2.0

package disk_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/labfile/lab/boxes/disk"
)

// Text is named for what it is, also if somebody followed the hint to pad a disk that
// has no whole sectors.
func TestInspectRefusesText(t *testing.T) {
	const lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
	tests := []struct{ name, text, what, hint string }{
		{"git-lfs", lfs, "a git-lfs pointer: the disk's name and checksum, without its content", "git lfs pull"},
		{"git-annex", "/annex/objects/SHA256E-s12--abc.img\n", "a git-annex pointer: the disk's name, without its content", "git annex get"},
		{"JSON", `{"name":"generic/debian12","versions":[]}`, "JSON text", "catalog"},
		{"JSON list", "\ufeff [\n1]", "JSON text", "catalog"},
		{"XML", `<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>`, "XML text", "error message"},
		{"HTML", "\n<!DOCTYPE HTML>\n<title>é</title>", "a web page (HTML)", "page about the image"},
		{"script", "#!/bin/sh\necho hi\n", "text", "look into the file"},
		{"a word", "Not Found", "text", "look into the file"},
		{"long", strings.Repeat("\x1b[0;1m12345 hello, wörld\r\n", 5000), "text", "look into the file"},
		{"long, cut in a character", "x" + strings.Repeat("é\n", 20000), "text", "look into the file"},
		{"key", "-----BEGIN PGP MESSAGE-----\n", "text", "look into the file"},
		{"whole sectors of JSON", "[" + strings.Repeat("1", 510) + "]", "JSON text", "catalog"},
	}
	for _, tt := range tests {
		for _, pad := range []int{0, -len(tt.text) & 511, 1<<20 - len(tt.text)} {
			_, err := inspect([]byte(tt.text + strings.Repeat("\x00", pad)))
			var unsafe *disk.UnsafeError
			if want := "the file is " + tt.what + ", not a qcow2 or raw disk"; !errors.As(err, &unsafe) || unsafe.Reason != want {
				t.Errorf("%s, with %d zeros: got %v, want %s", tt.name, pad, err, want)
			} else if !strings.Contains(unsafe.Hint(), tt.hint) || strings.Contains(unsafe.Hint(), "truncate") {
				t.Errorf("%s: hint %q lacks %q", tt.name, unsafe.Hint(), tt.hint)
			}
		}
	}
}

// What only begins like text is a disk.
func TestInspectAcceptsWhatIsNoText(t *testing.T) {
	for name, head := range map[string]string{
		"zeros":             "",
		"label":             "disk\x00label",
		"text behind zeros": strings.Repeat("\x00", 512) + "text\n",
		"Latin-1":           "caf\xe9\n",
		"control":           "{\x01}\n",
	} {
		b := make([]byte, 1<<20)
		copy(b, head)
		if info, err := inspect(b); err != nil || info.Format != disk.Raw {
			t.Errorf("%s: %+v, %v", name, info, err)
		}
	}
}
