// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"

	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/qcow2"
)

// Make makes the directory of the generation that spec describes: its overlay, its
// seed and, by finish, what says that it is whole. defined reports whether that is
// so already.
func Make(ctx context.Context, dir string, spec providers.Spec, defined func() (bool, error), finish func(Definition) error) error {
	if ok, err := defined(); ok || err != nil {
		return err
	}
	held, err := lockNew(ctx, dir)
	if err != nil {
		return err
	}
	defer held.Close()
	if ok, err := defined(); ok || err != nil {
		return err
	}
	def := Define(spec)
	if err := qcow2.Create(filepath.Join(dir, FileOverlay), def.Disk); err != nil {
		return fmt.Errorf("making its disk: %w", err)
	}
	if len(spec.Seed) > 0 {
		if err := os.WriteFile(filepath.Join(dir, FileSeed), spec.Seed, 0o600); err != nil {
			return fmt.Errorf("writing its seed: %w", err)
		}
	}
	return finish(def)
}

// lockNew takes the lock of a directory, making that if need be.
func lockNew(ctx context.Context, dir string) (*os.File, error) {
	for {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		held, err := Lock(ctx, filepath.Join(dir, FileLock))
		if err == nil || !Gone(err) { // else a Destroy took the directory away
			return held, err
		}
	}
}

// Discard moves a generation's directory out of the way in one step. The caller
// has its lock.
func Discard(dir string) error {
	trash := filepath.Join(filepath.Dir(dir), fmt.Sprintf("%s-%s-%s", TrashPrefix, filepath.Base(dir), rand.Text()[:8]))
	return IgnoreGone(os.Rename(dir, trash))
}

// Sweep removes what was discarded of the generation in dir, and then the
// directories above it, up to the one called labs, and the sockets' directory, as
// far as they are empty: what else a lab's directories hold is not ours.
func Sweep(dir, labs, sockets string) error {
	for _, t := range TrashOf(dir) {
		if err := os.RemoveAll(t); err != nil {
			return err
		}
	}
	os.Remove(sockets)
	for d := filepath.Dir(dir); d != labs; d = filepath.Dir(d) {
		if os.Remove(d) != nil {
			break
		}
	}
	return nil
}
