// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/volume"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/memory"
	"github.com/labfile/lab/providers/qcow2"
)

// far is a provider whose machines run elsewhere. While it is off, nobody can ask it;
// without a pool it has no files.
type far struct {
	*memory.Provider
	files   pool
	off     bool
	without bool
}

func (f *far) List(ctx context.Context, id lab.ID) ([]providers.Machine, error) {
	if f.off {
		return nil, fmt.Errorf("%w: it does not listen", providers.ErrIncapable)
	}
	return f.Provider.List(ctx, id)
}

func (f *far) VolumeFiles(context.Context, lab.ID) (providers.VolumeFiles, error) {
	if f.without || f.off {
		return nil, fmt.Errorf("%w: the pool is not there", providers.ErrIncapable)
	}
	return f.files, nil
}

// pool are files by their lengths.
type pool struct {
	providers.VolumeFiles // what is not asked for here
	files                 map[string]lab.Bytes
}

func (p pool) Path(name string) string { return "/far/" + name }

func (p pool) List(context.Context) ([]string, error) { return slices.Collect(maps.Keys(p.files)), nil }

func (p pool) Make(_ context.Context, name string, _ lab.Bytes) error {
	p.files[name] = qcow2.EmptySize
	return nil
}

func (p pool) Usage(_ context.Context, name string) (length, takes lab.Bytes, err error) {
	n, ok := p.files[name]
	if !ok {
		return 0, 0, fs.ErrNotExist
	}
	return n, n, nil
}

func (p pool) Remove(_ context.Context, name string) error {
	delete(p.files, name)
	return nil
}

// newFar is a bench whose machines run elsewhere, and a lab with a volume there.
func newFar(t *testing.T) (b *bench, f *far, l *Lab) {
	b = newBench(t)
	f = &far{Provider: b.provider, files: pool{files: map[string]lab.Bytes{}}}
	b.Providers["memory"] = f
	l = b.open()
	db := machine("db")
	db.Volumes = []lab.Volume{bare("data", lab.MiB)}
	b.up(l, b.want(db))
	return b, f, l
}

// TestUsersMustAnswer removes nothing from a machine that may run, here or elsewhere.
func TestUsersMustAnswer(t *testing.T) {
	b, f, l := newFar(t)
	if err := l.RemoveVolume(b.ctx, "data", 0, Options{}); !errors.Is(err, providers.ErrInUse) {
		t.Errorf("in use: %v", err)
	}
	f.off = true
	if err := l.RemoveVolume(b.ctx, "data", 0, Options{}); !errors.Is(err, providers.ErrIncapable) {
		t.Errorf("nobody knows: %v", err)
	}
	if len(f.files.files) != 1 {
		t.Errorf("the files are %v", f.files.files)
	}
	// What is known here is told.
	all, err := l.Volumes(b.ctx)
	if err != nil || len(all) != 1 || all[0].Size != lab.MiB || !strings.Contains(all[0].Problem, "is not there") {
		t.Errorf("%+v, %v", all, err)
	}
	if names, err := l.VolumeNames(); err != nil || !slices.Equal(names, []string{"data"}) {
		t.Errorf("%q, %v", names, err)
	}
	f.off = false

	here := newBench(t)
	l = here.open()
	db := machine("db")
	db.Volumes = []lab.Volume{bare("data", lab.MiB)}
	here.up(l, here.want(db))
	here.Providers["memory"] = &down{here.provider}
	if err := l.RemoveVolume(here.ctx, "data", 0, Options{}); !errors.Is(err, providers.ErrIncapable) {
		t.Errorf("nobody knows: %v", err)
	}
	here.Providers["memory"] = here.provider
	here.volume(l, "data")
}

// down is a provider of this host that does not answer.
type down struct{ *memory.Provider }

func (*down) List(context.Context, lab.ID) ([]providers.Machine, error) {
	return nil, fmt.Errorf("%w: it does not listen", providers.ErrIncapable)
}

// TestDestroyWithoutAPool ends a lab whose pool somebody has removed.
func TestDestroyWithoutAPool(t *testing.T) {
	b, f, l := newFar(t)
	f.without = true
	if err := l.Destroy(b.ctx, Options{}); err != nil {
		t.Fatal(err)
	}
	if l.book.Exists() {
		t.Error("the ledger is left")
	}
	if names, err := l.VolumeNames(); err != nil || len(names) != 1 { // it may come back
		t.Errorf("the volumes are %q, %v", names, err)
	}
	if err := l.Destroy(b.ctx, Options{Volumes: true}); !errors.Is(err, providers.ErrIncapable) {
		t.Errorf("its data cannot be removed: %v", err)
	}
	f.without = false
	if err := l.Destroy(b.ctx, Options{Volumes: true}); err != nil {
		t.Fatal(err)
	}
	if len(f.files.files) > 0 {
		t.Errorf("left: %v", f.files.files)
	}
}

// TestDamagedElsewhere leaves no files behind that nobody can name.
func TestDamagedElsewhere(t *testing.T) {
	b, f, l := newFar(t)
	f.files.files["half@1.qcow2"] = 1 // of a command that was killed
	description := filepath.Join(b.Dirs.Volumes(l.ID()), "data.json")
	if text, err := os.ReadFile(description); err != nil || !strings.Contains(string(text), `"version": 2`) {
		t.Errorf("an older lab would take it for one of this host: %s, %v", text, err)
	}
	if err := os.WriteFile(description, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.Destroy(b.ctx, Options{Volumes: true}); err != nil {
		t.Fatal(err)
	}
	if len(f.files.files) > 0 {
		t.Errorf("left: %v", f.files.files)
	}
}

// TestMissingTop takes no snapshot of what is not there.
func TestMissingTop(t *testing.T) {
	b, f, l := newFar(t)
	before, err := l.volumes().Get("data")
	if err != nil {
		t.Fatal(err)
	}
	delete(f.files.files, before.Layers[0])
	if _, err := l.volumes().Attach(b.ctx, "data", volume.Attachment{Machine: "db", Generation: 9}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("attaching what is not there: %v", err)
	}
	if after, err := l.volumes().Get("data"); err != nil || len(after.Layers) != 1 || len(after.Snapshots) != 0 {
		t.Errorf("%+v, %v", after, err)
	}
}
