/* What virtio-forwarder calls of libdpdk and bindgen cannot bind: static inlines, macros, and the
 * offsets of mbuf fields, whose paths differ by DPDK release. No policy. */
#ifndef VIRTIO_FORWARDER_DPDK_SHIM_H
#define VIRTIO_FORWARDER_DPDK_SHIM_H

#include <stddef.h>
#include <stdint.h>

#include <rte_version.h>
#include <rte_dev.h>
#include <rte_eal.h>
#include <rte_eal_memconfig.h>
#include <rte_errno.h>
#include <rte_ethdev.h>
#include <rte_lcore.h>
#include <rte_malloc.h>
#include <rte_mbuf.h>
#include <rte_memory.h>
#include <rte_mempool.h>
#include <rte_ring.h>

#if RTE_VERSION < RTE_VERSION_NUM(22, 11, 0, 0)
#error "virtio-forwarder needs DPDK 22.11 or newer"
#endif

/* struct rte_mbuf */
enum {
	/* 0 where mbufs do not have it: libdpdk was built for IOVA = VA only (the switch's name changed in 23.03) */
#if (defined(RTE_IOVA_AS_PA) && RTE_IOVA_AS_PA) || (defined(RTE_IOVA_IN_MBUF) && RTE_IOVA_IN_MBUF)
	SHIM_MBUF_BUF_IOVA = offsetof(struct rte_mbuf, buf_iova),
#else
	SHIM_MBUF_BUF_IOVA = 0,
#endif
	SHIM_MBUF_BUF_ADDR = offsetof(struct rte_mbuf, buf_addr),
	SHIM_MBUF_DATA_OFF = offsetof(struct rte_mbuf, data_off),
	SHIM_MBUF_REFCNT = offsetof(struct rte_mbuf, refcnt),
	SHIM_MBUF_NB_SEGS = offsetof(struct rte_mbuf, nb_segs),
	SHIM_MBUF_OL_FLAGS = offsetof(struct rte_mbuf, ol_flags),
	SHIM_MBUF_PKT_LEN = offsetof(struct rte_mbuf, pkt_len),
	SHIM_MBUF_DATA_LEN = offsetof(struct rte_mbuf, data_len),
	SHIM_MBUF_BUF_LEN = offsetof(struct rte_mbuf, buf_len),
	SHIM_MBUF_POOL = offsetof(struct rte_mbuf, pool),
	SHIM_MBUF_NEXT = offsetof(struct rte_mbuf, next),
	SHIM_MBUF_TX_OFFLOAD = offsetof(struct rte_mbuf, tx_offload),
	SHIM_MBUF_SIZE = sizeof(struct rte_mbuf),
	SHIM_HEADROOM = RTE_PKTMBUF_HEADROOM,
	/* bit positions inside tx_offload */
	SHIM_L2_LEN_SHIFT = RTE_MBUF_L2_LEN_OFS,
	SHIM_L3_LEN_SHIFT = RTE_MBUF_L3_LEN_OFS,
	SHIM_L4_LEN_SHIFT = RTE_MBUF_L4_LEN_OFS,
	SHIM_TSO_SEGSZ_SHIFT = RTE_MBUF_TSO_SEGSZ_OFS,
};

/* members of named enums */
enum {
	SHIM_IOVA_VA = RTE_IOVA_VA,
	SHIM_MEM_ALLOC = RTE_MEM_EVENT_ALLOC,
	SHIM_EVENT_RESET = RTE_ETH_EVENT_INTR_RESET,
};

/* mbuf flags and ethdev capabilities are casts and 64-bit macros */
static const uint64_t SHIM_TX_TCP_SEG = RTE_MBUF_F_TX_TCP_SEG;
static const uint64_t SHIM_TX_TCP_CKSUM = RTE_MBUF_F_TX_TCP_CKSUM;
static const uint64_t SHIM_TX_UDP_CKSUM = RTE_MBUF_F_TX_UDP_CKSUM;
static const uint64_t SHIM_TX_IP_CKSUM = RTE_MBUF_F_TX_IP_CKSUM;
static const uint64_t SHIM_TX_IPV4 = RTE_MBUF_F_TX_IPV4;
static const uint64_t SHIM_TX_IPV6 = RTE_MBUF_F_TX_IPV6;
static const uint64_t SHIM_RX_L4_CKSUM_MASK = RTE_MBUF_F_RX_L4_CKSUM_MASK;
static const uint64_t SHIM_RX_L4_CKSUM_GOOD = RTE_MBUF_F_RX_L4_CKSUM_GOOD;
static const uint64_t SHIM_MBUF_INDIRECT = RTE_MBUF_F_INDIRECT;
static const uint64_t SHIM_MBUF_EXTERNAL = RTE_MBUF_F_EXTERNAL;

static const uint64_t SHIM_TX_OFFLOAD_IPV4_CKSUM = RTE_ETH_TX_OFFLOAD_IPV4_CKSUM;
static const uint64_t SHIM_TX_OFFLOAD_UDP_CKSUM = RTE_ETH_TX_OFFLOAD_UDP_CKSUM;
static const uint64_t SHIM_TX_OFFLOAD_TCP_CKSUM = RTE_ETH_TX_OFFLOAD_TCP_CKSUM;
static const uint64_t SHIM_TX_OFFLOAD_TCP_TSO = RTE_ETH_TX_OFFLOAD_TCP_TSO;
static const uint64_t SHIM_TX_OFFLOAD_MULTI_SEGS = RTE_ETH_TX_OFFLOAD_MULTI_SEGS;
static const uint64_t SHIM_RX_OFFLOAD_UDP_CKSUM = RTE_ETH_RX_OFFLOAD_UDP_CKSUM;
static const uint64_t SHIM_RX_OFFLOAD_TCP_CKSUM = RTE_ETH_RX_OFFLOAD_TCP_CKSUM;
static const uint64_t SHIM_RSS_IP = RTE_ETH_RSS_IP;
static const uint64_t SHIM_RSS_TCP = RTE_ETH_RSS_TCP;
static const uint64_t SHIM_RSS_UDP = RTE_ETH_RSS_UDP;
static const uint32_t SHIM_MQ_RX_RSS = RTE_ETH_MQ_RX_RSS;
static const uint32_t SHIM_RETA_GROUP = RTE_ETH_RETA_GROUP_SIZE;
static const uint32_t SHIM_LCORE_ID_ANY = LCORE_ID_ANY;

uint16_t shim_rx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t n);
uint16_t shim_tx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t n);
uint16_t shim_tx_prepare(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t n);
int shim_mempool_get_bulk(struct rte_mempool *pool, struct rte_mbuf **mbufs, unsigned int n);
void shim_pktmbuf_free(struct rte_mbuf *mbuf);

/* VFIO containers of our own; later releases keep them to themselves (-ENOTSUP). */
int shim_vfio_container_create(void);
int shim_vfio_container_destroy(int container);
int shim_vfio_group_bind(int container, int group);

/* EAL's memory, in contiguous pieces; the caller has the memory lock. Ends when `each` returns other than 0. */
typedef int (*shim_each_piece)(const void *start, size_t len, void *arg);
int shim_walk_memory(shim_each_piece each, void *arg);
/* The size of the page at an address of EAL's memory. */
size_t shim_page_size(const void *start);

/* rte_errno and the lcore id are thread-local macros. */
int shim_errno(void);
uint32_t shim_lcore_id(void);

/* Bitfields. */
void shim_conf_rx_interrupts(struct rte_eth_conf *conf, int on);
int shim_link_is_up(const struct rte_eth_link *link);

#endif
