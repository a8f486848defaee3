// SPDX-License-Identifier: Apache-2.0

//go:build linux

package sshd

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestEnvironment(t *testing.T) {
	etc := t.TempDir()
	if got := environment(etc); got != nil {
		t.Errorf("without a file: %q", got)
	}
	text := "# begin: written by lab\nhttp_proxy=http://a:b%24@p:1\n\n  export X=1 \nQ=\"a b\"\nR='c'\nS=\"\na-b=1\n=2\nnothing\nE=\n"
	if err := os.WriteFile(filepath.Join(etc, "environment"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"http_proxy=http://a:b%24@p:1", "X=1", "Q=a b", "R=c", "S=\"", "E="}, environment(etc)); diff != "" {
		t.Error(diff)
	}
}
