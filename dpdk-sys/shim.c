#include "shim.h"

#include <errno.h>

#if __has_include(<rte_vfio.h>)
#include <rte_vfio.h>

int shim_vfio_container_create(void)
{
	return rte_vfio_container_create();
}

int shim_vfio_container_destroy(int container)
{
	return rte_vfio_container_destroy(container);
}

int shim_vfio_group_bind(int container, int group)
{
	return rte_vfio_container_group_bind(container, group);
}
#else
int shim_vfio_container_create(void)
{
	return -ENOTSUP;
}

int shim_vfio_container_destroy(int container)
{
	(void)container;
	return -ENOTSUP;
}

int shim_vfio_group_bind(int container, int group)
{
	(void)container;
	(void)group;
	return -ENOTSUP;
}
#endif

struct walk {
	shim_each_piece each;
	void *arg;
};

static int each_piece(const struct rte_memseg_list *list, const struct rte_memseg *first, size_t len, void *arg)
{
	const struct walk *walk = arg;

	/* what an application brought along is not EAL's */
	if (list->external && !list->heap)
		return 0;
	return walk->each(first->addr, len, walk->arg);
}

int shim_walk_memory(shim_each_piece each, void *arg)
{
	struct walk walk = { each, arg };

	return rte_memseg_contig_walk_thread_unsafe(each_piece, &walk);
}

size_t shim_page_size(const void *start)
{
	const struct rte_memseg_list *list = rte_mem_virt2memseg_list(start);

	return list == NULL ? 0 : list->page_sz;
}

uint16_t shim_rx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t n)
{
	return rte_eth_rx_burst(port, queue, mbufs, n);
}

uint16_t shim_tx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t n)
{
	return rte_eth_tx_burst(port, queue, mbufs, n);
}

uint16_t shim_tx_prepare(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t n)
{
	return rte_eth_tx_prepare(port, queue, mbufs, n);
}

int shim_mempool_get_bulk(struct rte_mempool *pool, struct rte_mbuf **mbufs, unsigned int n)
{
	return rte_mempool_get_bulk(pool, (void **)mbufs, n);
}

void shim_pktmbuf_free(struct rte_mbuf *mbuf)
{
	rte_pktmbuf_free(mbuf);
}

int shim_errno(void)
{
	return rte_errno;
}

uint32_t shim_lcore_id(void)
{
	return rte_lcore_id();
}

void shim_conf_rx_interrupts(struct rte_eth_conf *conf, int on)
{
	conf->intr_conf.rxq = on ? 1 : 0;
}

int shim_link_is_up(const struct rte_eth_link *link)
{
	return link->link_status == RTE_ETH_LINK_UP;
}
