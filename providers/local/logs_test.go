// SPDX-License-Identifier: Apache-2.0

package local

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/labfile/lab/providers"
	"golang.org/x/sys/unix"
)

func TestEventRecordIsGivenBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.out")
	line := []byte(stamp + `"event": "RESET"}` + "\n")
	f, err := os.Create(path)
	check(t, err)
	for range 4 * MaxEventTail / len(line) {
		_, err := f.Write(line)
		check(t, err)
	}
	before := blocks(t, path)
	check(t, giveBack(path))
	_, err = f.WriteString(shutdownEvent("guest-shutdown"))
	check(t, err, f.Close())
	if after := blocks(t, path); after > before/2 {
		t.Errorf("%d blocks, before %d", after, before)
	}
	spoke, events := ReadEvents(filepath.Dir(path))
	if e, ok := Announced(events); !spoke || !ok || e.Reason != providers.ExitGuest {
		t.Errorf("the exit is %+v, %v, %v", e, spoke, ok)
	}
}

func blocks(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	check(t, unix.Stat(path, &st))
	return st.Blocks
}

func check(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}
