// SPDX-License-Identifier: Apache-2.0

package local

import (
	"path/filepath"
	"testing"
)

func TestHostRoom(t *testing.T) {
	there := t.TempDir()
	now, err := HostRoom(there)
	if err != nil || now.At != there || now.Free <= 0 {
		t.Errorf("%+v, %v", now, err)
	}
	later := filepath.Join(there, "not", "made", "yet")
	if got, err := HostRoom(later); err != nil || got.At != later || got.Free <= 0 {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := HostRoom("/proc/self/status/none"); err == nil && got.Free > 0 {
		t.Errorf("%+v of a file system that holds no files", got)
	}
}
