// SPDX-License-Identifier: Apache-2.0

package drift

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDiff(t *testing.T) {
	tree, dir := t.TempDir(), t.TempDir()
	write(t, filepath.Join(tree, "etc/text"), "one\ntwo\nthree\n")
	write(t, filepath.Join(tree, "etc/binary"), "\x00\x01")
	base := image(t, tree, "64M")
	write(t, filepath.Join(dir, "text"), "one\n2\nthree\n")
	write(t, filepath.Join(dir, "binary"), "\x00\x02")
	write(t, filepath.Join(dir, "key"), "-----BEGIN OPENSSH PRIVATE KEY-----\n")
	over := overlay(t, base, "rm /etc/text\nwrite "+dir+"/text /etc/text\nrm /etc/binary\nwrite "+dir+"/binary /etc/binary\nwrite "+dir+"/text /etc/z\nwrite "+dir+"/key /etc/key\nwrite "+dir+"/text /etc/shadow\n")
	old, now := root(t, Layer{base, "raw"}), root(t, Layer{base, "raw"}, Layer{over, "qcow2"})
	r, err := Compare(context.Background(), old, now, Options{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range r.Changes {
		text, err := Diff(t.Context(), old, now, c)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, text)
	}
	want := []string{
		"\"/etc/binary\" is binary\n",
		"\"/etc/key\" has secrets, which are not shown\n",
		"\"/etc/shadow\" has secrets, which are not shown\n",
		"diff a/etc/text b/etc/text\n--- a/etc/text\n+++ b/etc/text\n@@ -1,3 +1,3 @@\n one\n-two\n+2\n three\n",
		"diff /dev/null b/etc/z\n--- /dev/null\n+++ b/etc/z\n@@ -0,0 +1,3 @@\n+one\n+2\n+three\n",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("diffs (-want +got):\n%s", d)
	}
}
