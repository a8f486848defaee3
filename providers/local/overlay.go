// SPDX-License-Identifier: Apache-2.0

package local

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/labfile/lab/internal/fsutil"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers/qcow2"
)

// A machine's disk is a pile of overlays above its image: those files of its
// directory that are called disk.qcow2 and disk.N.qcow2, in the order of their
// numbers, of which disk.qcow2 has 0. The directory alone says which there are,
// and each step of a change leaves a pile that reads as before: a fresh overlay
// hides nothing until the machine writes to it; what was merged is merged into
// the lowest of several, and the others, which say the same, are removed from
// below.

// Chain is what disk.json holds. It is absent as long as both are 0.
type Chain struct {
	Version int `json:"version"`
	Birth   int `json:"birth"`  // overlays with lower numbers are the birth; 0 if there is none yet
	Frozen  int `json:"frozen"` // overlays with lower numbers never change again
}

const chainVersion = 1

// ReadChain reads which overlays are frozen.
func ReadChain(dir string) (Chain, error) {
	c := Chain{Version: chainVersion}
	path := filepath.Join(dir, FileChain)
	if _, err := ReadJSON(path, &c); err != nil {
		return c, err
	}
	if c.Version != chainVersion {
		return c, fmt.Errorf("%s has version %d, this lab knows version %d", path, c.Version, chainVersion)
	}
	return c, nil
}

// OverlayPath is the file of overlay n.
func OverlayPath(dir string, n int) string {
	if n == 0 {
		return filepath.Join(dir, FileOverlay)
	}
	return filepath.Join(dir, fmt.Sprintf("%s%d%s", overlayPrefix, n, overlaySuffix))
}

// OverlayOf returns the number of the overlay whose file is path.
func OverlayOf(dir, path string) (int, bool) {
	if filepath.Dir(path) != filepath.Clean(dir) {
		return 0, false
	}
	if filepath.Base(path) == FileOverlay {
		return 0, true
	}
	return Number(filepath.Base(path), overlayPrefix, overlaySuffix)
}

const (
	overlayPrefix = "disk."
	overlaySuffix = ".qcow2"
)

// Number reads the number between prefix and suffix, in its only spelling.
func Number(s, prefix, suffix string) (int, bool) {
	s, before := strings.CutPrefix(s, prefix)
	s, behind := strings.CutSuffix(s, suffix)
	n, err := strconv.Atoi(s)
	return n, before && behind && err == nil && n > 0 && strconv.Itoa(n) == s
}

// Overlays returns the numbers of the overlays, ascending.
func Overlays(dir string) ([]int, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var found []int
	for _, e := range entries {
		if e.Name() == FileOverlay {
			found = append(found, 0)
		} else if n, ok := Number(e.Name(), overlayPrefix, overlaySuffix); ok {
			found = append(found, n)
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%s is missing", filepath.Join(dir, FileOverlay))
	}
	slices.Sort(found)
	return found, nil
}

// AddOverlay makes a fresh overlay of the definition's size. It comes into being
// whole, for an overlay that is there counts.
func AddOverlay(dir string, n int, size lab.Bytes) error {
	path := OverlayPath(dir, n)
	half := filepath.Join(dir, ".disk-new")
	if err := qcow2.Create(half, size); err != nil {
		return err
	}
	return fsutil.Rename(half, path)
}

// Empty reports whether nothing was ever written to an overlay. It is only true
// of a machine that does not run: QEMU may hold back the first writes.
func Empty(dir string, n int) (bool, error) {
	fi, err := os.Stat(OverlayPath(dir, n))
	return err == nil && fi.Size() == qcow2.EmptySize, err
}

// EmptyTakes is about what an empty overlay takes on the host: the pages of its
// header and its two refcount structures.
const EmptyTakes = 3 * 4096

// Usage returns what the overlays take on the host, and what those above the
// birth take without the structures of empty ones.
func Usage(dir string) (all, written lab.Bytes, err error) {
	own, err := Overlays(dir)
	if err != nil {
		return 0, 0, nil // half made
	}
	c, err := ReadChain(dir)
	if err != nil {
		return 0, 0, err
	}
	for _, n := range own {
		fi, err := os.Stat(OverlayPath(dir, n))
		if err != nil {
			continue // merged just now
		}
		st, ok := fi.Sys().(*syscall.Stat_t)
		if !ok {
			continue
		}
		takes := lab.Bytes(st.Blocks * 512) // stat(2): blocks of 512 bytes
		all += takes
		if c.Birth > 0 && n >= c.Birth && fi.Size() > qcow2.EmptySize {
			written += max(0, takes-EmptyTakes)
		}
	}
	return all, written, nil
}
