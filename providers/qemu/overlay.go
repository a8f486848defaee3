// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

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

// chain is what disk.json holds. It is absent as long as both are 0.
type chain struct {
	Version int `json:"version"`
	Birth   int `json:"birth"`  // overlays with lower numbers are the birth; 0 if there is none yet
	Frozen  int `json:"frozen"` // overlays with lower numbers never change again
}

const chainVersion = 1

func readChain(dir string) (chain, error) {
	c := chain{Version: chainVersion}
	path := filepath.Join(dir, fileChain)
	if _, err := readJSON(path, &c); err != nil {
		return c, err
	}
	if c.Version != chainVersion {
		return c, fmt.Errorf("%s has version %d, this lab knows version %d", path, c.Version, chainVersion)
	}
	return c, nil
}

// overlay names the files and nodes of overlay n.
func overlay(dir string, n int) Overlay {
	if n == 0 {
		return Overlay{Path: filepath.Join(dir, fileOverlay), Node: deviceDisk}
	}
	return Overlay{
		Path: filepath.Join(dir, fmt.Sprintf("%s%d%s", overlayPrefix, n, overlaySuffix)),
		Node: fmt.Sprintf("%s%d", nodePrefix, n),
	}
}

const (
	overlayPrefix = "disk."
	overlaySuffix = ".qcow2"
	nodePrefix    = deviceDisk + "-"
)

// overlayOf returns the number of the overlay that QEMU calls node.
func overlayOf(node string) (int, error) {
	if node == deviceDisk {
		return 0, nil
	}
	if n, ok := number(node, nodePrefix, ""); ok {
		return n, nil
	}
	return 0, fmt.Errorf("the machine writes to %q, which is no overlay of its own", node)
}

// number reads the number between prefix and suffix, in its only spelling.
func number(s, prefix, suffix string) (int, bool) {
	s, before := strings.CutPrefix(s, prefix)
	s, behind := strings.CutSuffix(s, suffix)
	n, err := strconv.Atoi(s)
	return n, before && behind && err == nil && n > 0 && strconv.Itoa(n) == s
}

// overlays returns the numbers of the overlays, ascending.
func overlays(dir string) ([]int, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var found []int
	for _, e := range entries {
		if e.Name() == fileOverlay {
			found = append(found, 0)
		} else if n, ok := number(e.Name(), overlayPrefix, overlaySuffix); ok {
			found = append(found, n)
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%s is missing", filepath.Join(dir, fileOverlay))
	}
	slices.Sort(found)
	return found, nil
}

// addOverlay makes a fresh overlay of the definition's size. It comes into being
// whole, for an overlay that is there counts.
func addOverlay(dir string, n int, size lab.Bytes) error {
	path := overlay(dir, n).Path
	half := filepath.Join(dir, ".disk-new")
	if err := qcow2.Create(half, size); err != nil {
		return err
	}
	return os.Rename(half, path)
}

// empty reports whether nothing was ever written to an overlay. It is only true
// of a machine that does not run: QEMU may hold back the first writes.
func empty(dir string, n int) (bool, error) {
	fi, err := os.Stat(overlay(dir, n).Path)
	return err == nil && fi.Size() == qcow2.EmptySize, err
}

// emptyTakes is about what an empty overlay takes on the host: the pages of its
// header and its two refcount structures.
const emptyTakes = 3 * 4096

// usage returns what the overlays take on the host, and what those above the
// birth take without the structures of empty ones.
func usage(dir string) (all, written lab.Bytes, err error) {
	own, err := overlays(dir)
	if err != nil {
		return 0, 0, nil // half made
	}
	c, err := readChain(dir)
	if err != nil {
		return 0, 0, err
	}
	for _, n := range own {
		fi, err := os.Stat(overlay(dir, n).Path)
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
			written += max(0, takes-emptyTakes)
		}
	}
	return all, written, nil
}
