// SPDX-License-Identifier: Apache-2.0

package providertest

// What the guest of BootDisk prints when it has booted, and what it does when
// one of the keys is typed at its console. Any other key is echoed.
const (
	Banner   = "lab test disk"
	KeyOff   = "q" // powers off
	KeyPanic = "p" // reports a kernel panic through pvpanic
	KeyReset = "r" // resets the machine
	KeyWrite = "w" // writes the next sector of its disk, the second at first, and is echoed once that is done
)

// sectorMark is where in each sector that the guest writes its number stands:
// that of the next sector to write, counted from 1, little-endian.
const sectorMark = 0x1fc

// BootDisk returns a raw disk of 1 MiB whose boot sector is a whole guest: it
// prints Banner on the first serial port and obeys the keys. It boots from BIOS
// on a PC with PIIX4 power management in a fraction of a second, even emulated.
// A deaf one ignores the power button.
func BootDisk(deaf bool) []byte {
	code := []byte{
		0xfa,       // 7c00 cli
		0x31, 0xc0, // 7c01 xor ax, ax
		0x8e, 0xd8, // 7c03 mov ds, ax
		0x8e, 0xc0, // 7c05 mov es, ax
		0x8e, 0xd0, // 7c07 mov ss, ax
		0xbc, 0x00, 0x7c, // 7c09 mov sp, 0x7c00
		0xea, 0x11, 0x7c, 0x00, 0x00, // 7c0c jmp 0:0x7c11
		0xba, 0x02, 0x06, // 7c11 mov dx, 0x602: power management, enable
		0xb8, 0x00, 0x01, // 7c14 mov ax, 0x100: the power button
		0xef,             // 7c17 out dx, ax
		0xbe, 0x9a, 0x7c, // 7c18 mov si, 0x7c9a: the banner
		0xac,       // 7c1b lodsb
		0x84, 0xc0, // 7c1c test al, al
		0x74, 0x05, // 7c1e jz 7c25
		0xe8, 0x66, 0x00, // 7c20 call 7c89
		0xeb, 0xf6, // 7c23 jmp 7c1b
		0xfb,             // 7c25 sti
		0xf4,             // 7c26 hlt: the next timer tick wakes it
		0xfa,             // 7c27 cli
		0xba, 0x00, 0x06, // 7c28 mov dx, 0x600: power management, status
		0xed,             // 7c2b in ax, dx
		0xf6, 0xc4, 0x01, // 7c2c test ah, 1: the power button was pressed
		0x75, 0x3c, // 7c2f jnz 7c6d
		0xba, 0xfd, 0x03, // 7c31 mov dx, 0x3fd: line status
		0xec,       // 7c34 in al, dx
		0xa8, 0x01, // 7c35 test al, 1: a byte has come
		0x74, 0xec, // 7c37 jz 7c25
		0xba, 0xf8, 0x03, // 7c39 mov dx, 0x3f8: data
		0xec,       // 7c3c in al, dx
		0x3c, 0x71, // 7c3d cmp al, 'q'
		0x74, 0x2c, // 7c3f je 7c6d
		0x3c, 0x70, // 7c41 cmp al, 'p'
		0x74, 0x32, // 7c43 je 7c77
		0x3c, 0x72, // 7c45 cmp al, 'r'
		0x74, 0x37, // 7c47 je 7c80
		0x3c, 0x77, // 7c49 cmp al, 'w'
		0x74, 0x05, // 7c4b je 7c52
		0xe8, 0x39, 0x00, // 7c4d call 7c89
		0xeb, 0xd3, // 7c50 jmp 7c25
		0xb8, 0x01, 0x03, // 7c52 mov ax, 0x301: write one sector
		0xbb, 0x00, 0x7c, // 7c55 mov bx, 0x7c00: what this code lies in
		0x8b, 0x0e, 0xfc, 0x7d, // 7c58 mov cx, [0x7dfc]: cylinder 0, sector
		0xff, 0x06, 0xfc, 0x7d, // 7c5c inc word [0x7dfc]
		0xba, 0x80, 0x00, // 7c60 mov dx, 0x80: head 0, the first disk
		0xcd, 0x13, // 7c63 int 0x13
		0xb0, 0x77, // 7c65 mov al, 'w'
		0x73, 0xe4, // 7c67 jnc 7c4d
		0xb0, 0x21, // 7c69 mov al, '!'
		0xeb, 0xe0, // 7c6b jmp 7c4d
		0xba, 0x04, 0x06, // 7c6d mov dx, 0x604: power management, control
		0xb8, 0x00, 0x20, // 7c70 mov ax, 0x2000: sleep type 0, power off
		0xef,       // 7c73 out dx, ax
		0xf4,       // 7c74 hlt
		0xeb, 0xfd, // 7c75 jmp 7c74
		0xba, 0x05, 0x05, // 7c77 mov dx, 0x505: pvpanic
		0xb0, 0x01, // 7c7a mov al, 1: panicked
		0xee,       // 7c7c out dx, al
		0xf4,       // 7c7d hlt
		0xeb, 0xfd, // 7c7e jmp 7c7d
		0xb0, 0x06, // 7c80 mov al, 6: hard reset
		0xba, 0xf9, 0x0c, // 7c82 mov dx, 0xcf9: reset control
		0xee,       // 7c85 out dx, al
		0xf4,       // 7c86 hlt
		0xeb, 0xfd, // 7c87 jmp 7c86
		0x88, 0xc3, // 7c89 mov bl, al
		0xba, 0xfd, 0x03, // 7c8b mov dx, 0x3fd
		0xec,       // 7c8e in al, dx
		0xa8, 0x20, // 7c8f test al, 0x20: room for a byte
		0x74, 0xfb, // 7c91 jz 7c8e
		0xba, 0xf8, 0x03, // 7c93 mov dx, 0x3f8
		0x88, 0xd8, // 7c96 mov al, bl
		0xee, // 7c98 out dx, al
		0xc3, // 7c99 ret
	}
	if deaf {
		code[0x2e] = 0x00 // test ah, 0: never
	}
	disk := make([]byte, 1<<20)
	n := copy(disk, code)
	copy(disk[n:], Banner+"\r\n\x00")
	disk[sectorMark] = 2
	disk[510], disk[511] = 0x55, 0xaa // the BIOS boots only with this mark
	return disk
}
