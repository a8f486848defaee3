// SPDX-License-Identifier: Apache-2.0

package disk_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/labfile/lab/boxes/disk"
)

// A qcow2 header can name another file, which any tool that opens the image would read.
func ExampleInspect() {
	const backing = "/etc/shadow"
	image := make([]byte, 1<<16)
	copy(image, "QFI\xfb")
	binary.BigEndian.PutUint32(image[4:], 3)                     // version
	binary.BigEndian.PutUint64(image[8:], 104)                   // where the name is
	binary.BigEndian.PutUint32(image[16:], uint32(len(backing))) // how long it is
	binary.BigEndian.PutUint32(image[20:], 16)                   // clusters of 64 KiB
	binary.BigEndian.PutUint64(image[24:], 1<<30)                // size of the disk
	binary.BigEndian.PutUint32(image[100:], 104)                 // length of the header
	copy(image[104:], backing)

	_, err := disk.Inspect(bytes.NewReader(image), int64(len(image)))
	fmt.Println(errors.Is(err, disk.ErrUnsafe))
	fmt.Println(err)
	// Output:
	// true
	// unsafe disk image: the image has a backing file, "/etc/shadow", which could be any file of this host
}
