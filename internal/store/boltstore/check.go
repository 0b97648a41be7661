package boltstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
)

// The form of a bbolt file, as far as it must be known to tell whether bbolt
// can read it without falling over: pages of one size; each begins with id,
// flags, count and overflow; pages 0 and 1 are headers ("meta"), of which the
// valid one with the higher transaction counts.
const (
	pageHeader   = 16
	metaSize     = 64
	elementSize  = 16
	bucketHeader = 16

	branchPage = 0x01
	leafPage   = 0x02
	freePage   = 0x10

	bucketElement = 0x01

	metaMagic   = 0xED0CDAED
	metaVersion = 2
	noFreelist  = ^uint64(0)
	manyFree    = 0xFFFF
)

var native = binary.NativeEndian

// meta is a header page.
type meta struct {
	pageSize                  int64
	root, freelist, high, txn uint64
}

func parseMeta(b []byte) (meta, error) {
	if native.Uint32(b) != metaMagic {
		return meta{}, errors.New("it is not a database")
	}
	if v := native.Uint32(b[4:]); v != metaVersion {
		return meta{}, fmt.Errorf("its database format is %d, and should be %d", v, metaVersion)
	}
	h := fnv.New64a()
	h.Write(b[:metaSize-8])
	if h.Sum64() != native.Uint64(b[metaSize-8:]) {
		return meta{}, errors.New("the checksum of its header is wrong")
	}
	m := meta{int64(native.Uint32(b[8:])), native.Uint64(b[16:]), native.Uint64(b[32:]), native.Uint64(b[40:]), native.Uint64(b[48:])}
	if m.pageSize < 1024 || m.pageSize > 1<<24 || m.pageSize&(m.pageSize-1) != 0 {
		return meta{}, fmt.Errorf("its page size is %d", m.pageSize)
	}
	return m, nil
}

// checkFile tells why bbolt could not trust the file, and whether it has to do
// without one of the two header pages. It reads every page that is in use.
func checkFile(f *os.File, size int64) (spare bool, err error) {
	if size == 0 {
		return false, errors.New("it is empty, which a store file never is")
	}
	readMeta := func(at int64) (meta, error) {
		b := make([]byte, metaSize)
		if err := readAt(f, b, at+pageHeader); err != nil {
			return meta{}, err
		}
		return parseMeta(b)
	}
	best, err0 := readMeta(0)
	pageSize := best.pageSize
	if err0 != nil {
		pageSize = int64(os.Getpagesize())
	}
	other, err1 := readMeta(pageSize)
	switch {
	case err0 != nil && err1 != nil:
		return false, err0
	case err0 != nil || err1 == nil && other.txn > best.txn:
		best = other
	}
	if best.pageSize != pageSize {
		return false, errors.New("its header pages are of different sizes")
	}
	if int64(best.high) > size/pageSize {
		return false, fmt.Errorf("it is cut off: it has %d bytes, and should have %d", size, int64(best.high)*pageSize)
	}
	c := checker{f: f, meta: best, used: map[uint64]bool{0: true, 1: true}}
	if err := c.tree(best.root, nil, nil); err != nil {
		return false, err
	}
	return err0 != nil || err1 != nil, c.free(best.freelist)
}

func readAt(f *os.File, b []byte, at int64) error {
	_, err := f.ReadAt(b, at)
	if errors.Is(err, io.EOF) {
		return errors.New("it is cut off")
	}
	return err
}

// checker walks through all pages in use.
type checker struct {
	f *os.File
	meta
	used map[uint64]bool
}

// page reads a page with its overflow. None may be in use twice.
func (c *checker) page(id uint64) ([]byte, error) {
	if id < 2 || id >= c.high {
		return nil, fmt.Errorf("it refers to page %d of %d", id, c.high)
	}
	header := make([]byte, pageHeader)
	if err := readAt(c.f, header, int64(id)*c.pageSize); err != nil {
		return nil, err
	}
	if got := native.Uint64(header); got != id {
		return nil, fmt.Errorf("page %d says that it is page %d", id, got)
	}
	overflow := uint64(native.Uint32(header[12:]))
	if overflow >= c.high-id {
		return nil, fmt.Errorf("page %d has %d more pages, beyond the end", id, overflow)
	}
	for i := id; i <= id+overflow; i++ {
		if c.used[i] {
			return nil, fmt.Errorf("page %d is in use twice", i)
		}
		c.used[i] = true
	}
	b := make([]byte, int64(overflow+1)*c.pageSize)
	if err := readAt(c.f, b, int64(id)*c.pageSize); err != nil {
		return nil, err
	}
	return b, nil
}

// tree walks through the pages of a bucket from its root. All keys must be at
// least from and below to, where these are not nil.
func (c *checker) tree(id uint64, from, to []byte) error {
	b, err := c.page(id)
	if err != nil {
		return err
	}
	switch flags := native.Uint16(b[8:]); flags {
	case leafPage:
		err = c.leaf(b, from, to)
	case branchPage:
		err = c.branch(b, from, to)
	default:
		err = fmt.Errorf("it is of an unexpected sort (%#x)", flags)
	}
	if err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	return nil
}

// elements returns where each element of a page begins.
func elements(b []byte) ([][]byte, error) {
	count := int(native.Uint16(b[10:]))
	if pageHeader+count*elementSize > len(b) {
		return nil, fmt.Errorf("%d elements are too many", count)
	}
	out := make([][]byte, count)
	for i := range out {
		out[i] = b[pageHeader+i*elementSize:]
	}
	return out, nil
}

// piece is what an element has at pos.
func piece(element []byte, pos, size uint64) ([]byte, error) {
	if pos+size > uint64(len(element)) {
		return nil, errors.New("an element lies beyond the end")
	}
	return element[pos : pos+size], nil
}

// order checks that a key stands where it belongs.
func order(key, last, from, to []byte, first bool) error {
	if !first && bytes.Compare(key, last) <= 0 || from != nil && bytes.Compare(key, from) < 0 || to != nil && bytes.Compare(key, to) >= 0 {
		return fmt.Errorf("the key %q stands in the wrong place", key)
	}
	return nil
}

func (c *checker) leaf(b, from, to []byte) error {
	list, err := elements(b)
	if err != nil {
		return err
	}
	var last []byte
	for i, e := range list {
		pos, size, valueSize := uint64(native.Uint32(e[4:])), uint64(native.Uint32(e[8:])), uint64(native.Uint32(e[12:]))
		key, err := piece(e, pos, size)
		if err != nil {
			return err
		}
		value, err := piece(e, pos+size, valueSize)
		if err != nil {
			return err
		}
		if err := order(key, last, from, to, i == 0); err != nil {
			return err
		}
		last = key
		if native.Uint32(e)&bucketElement != 0 {
			if err := c.bucket(value); err != nil {
				return fmt.Errorf("bucket %q: %w", key, err)
			}
		}
	}
	return nil
}

// bucket checks a bucket within a bucket: one with pages of its own, or a small
// one that is a leaf page within the value.
func (c *checker) bucket(value []byte) error {
	if len(value) < bucketHeader {
		return errors.New("it is cut off")
	}
	if root := native.Uint64(value); root != 0 {
		return c.tree(root, nil, nil)
	}
	inline := value[bucketHeader:]
	if len(inline) < pageHeader || native.Uint16(inline[8:]) != leafPage {
		return errors.New("it has no leaf page")
	}
	return c.leaf(inline, nil, nil)
}

func (c *checker) branch(b, from, to []byte) error {
	list, err := elements(b)
	if err != nil {
		return err
	}
	if len(list) == 0 {
		return errors.New("it leads nowhere")
	}
	keys := make([][]byte, len(list))
	var last []byte
	for i, e := range list {
		if keys[i], err = piece(e, uint64(native.Uint32(e)), uint64(native.Uint32(e[4:]))); err != nil {
			return err
		}
		if err := order(keys[i], last, from, to, i == 0); err != nil {
			return err
		}
		last = keys[i]
	}
	for i, e := range list {
		end := to
		if i+1 < len(list) {
			end = keys[i+1]
		}
		if err := c.tree(native.Uint64(e[8:]), keys[i], end); err != nil {
			return err
		}
	}
	return nil
}

// free checks that no page that is free is in use.
func (c *checker) free(id uint64) error {
	if id == noFreelist {
		return errors.New("it has no list of free pages")
	}
	b, err := c.page(id)
	if err != nil {
		return fmt.Errorf("the list of free pages: %w", err)
	}
	if native.Uint16(b[8:]) != freePage {
		return errors.New("the list of free pages is not where it should be")
	}
	count, ids := uint64(native.Uint16(b[10:])), b[pageHeader:]
	if count == manyFree {
		count, ids = native.Uint64(ids), ids[8:]
	}
	if count > uint64(len(ids)/8) {
		return fmt.Errorf("the list of free pages has %d entries", count)
	}
	for i := range count {
		page := native.Uint64(ids[i*8:])
		if page >= c.high || c.used[page] {
			return fmt.Errorf("the list of free pages has page %d, which is none or in use", page)
		}
		c.used[page] = true
	}
	return nil
}
