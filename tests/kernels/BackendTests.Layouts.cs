namespace Rollout.Kernels.Tests;

/// <summary>Layers of different layouts in one cache, keys and values of different widths, and several attentions in one step.</summary>
public abstract partial class BackendTests
{
    /// <summary>Layers of a cache: equal; with different heads and widths; and with values of another width than keys.</summary>
    public static readonly TheoryData<string> Layouts = ["alike", "different", "own value widths"];

    private KvLayout[] LayoutsOf(string kind)
    {
        Assert.SkipUnless(kind != "own value widths" || HasOwnValueWidths, "Keys and values have one width.");
        return kind switch
        {
            "alike" => [new(3, 16, 16), new(3, 16, 16), new(3, 16, 16)],
            "different" => [new(2, 16, 16), new(1, 64, 64), new(4, 10, 10), new(1, 32, 32)],
            _ => [new(2, 24, 16), new(1, 16, 40), new(3, 6, 1), new(2, 32, 32), new(1, 2, 80), new(1, 130, 33)],
        };
    }

    /// <summary>
    /// All layers in every step, one attention after another: a prompt, one that continues in the middle of a block, single rows, and both;
    /// every layer with its own number of heads, every second with norms. A GPU's step with answers is sent at its end, one without is sent
    /// at once.
    /// </summary>
    [Theory]
    [InlineData("alike", true)]
    [InlineData("different", false)]
    [InlineData("different", true)]
    [InlineData("own value widths", true)]
    public void Layers_of_every_layout_equal_the_reference_in_every_kind_of_step(string kind, bool withAnswer)
    {
        KvLayout[] layouts = LayoutsOf(kind);
        Compare(New(), 21, 3e-5, bench =>
        {
            const int Sequences = 3, MaxBlocks = 6;
            KvCache cache = bench.Backend.AllocateKvCache(Sequences * MaxBlocks, layouts);
            RopeTable[] ropes = [.. layouts.Select(layout => bench.Rope(layout.KeyDim, MaxBlocks * KvCache.BlockTokens))];
            Weight[] norms = [.. layouts.Select(layout => bench.Weight(1, layout.KeyDim))];
            for (int layer = 0; layer < layouts.Length; layer++)
                bench.Soil(cache, layer);
            (int Start, int End)[][] steps =
            [
                [(0, 21), (0, 70), (0, 1)],
                [(21, 37), (70, 70), (1, 2)],
                [(37, 38), (70, 71), (2, 3)],
                [(38, 39), (71, 80), (3, 4)],
                [(39, 40), (80, 81), (4, 5)],
            ];
            List<float> results = [];
            foreach ((int Start, int End)[] positions in steps)
            {
                StepLayout step = Bench.Step(Sequences, MaxBlocks, s => positions[s], (s, b) => ((s * MaxBlocks) + b) * 5 % 18);
                if (withAnswer)
                    (step.OutputCount, step.QueryCount, step.Queries[0]) = (1, 1, Bench.Query(0));
                Tensor[] qkv = [.. layouts.Select((layout, layer) => bench.Tensor(step.RowCount, Bench.Columns(Heads(layer), layout)))];
                Tensor[] outputs = [.. layouts.Select((layout, layer) =>
                    bench.Backend.AllocateTensor(step.RowCount, Heads(layer) * layout.ValueDim))];
                Tensor logits = bench.Tensor(1, 8);
                bench.Backend.BeginStep(step);
                for (int layer = 0; layer < layouts.Length; layer++)
                {
                    (Weight? ofQueries, Weight? ofKeys) = (layer % 2 == 1 ? norms[layer] : null, layer % 4 == 1 ? norms[layer] : null);
                    bench.Attend(qkv[layer], Heads(layer), ropes[layer], cache, layer, outputs[layer], 0.3f, ofQueries, ofKeys, 1e-6f);
                }

                if (withAnswer)
                    bench.Backend.Sample(logits, 0, 1);
                bench.Backend.FinishStep(step);
                foreach (Tensor output in outputs)
                    results.AddRange(Bench.Read(output, step.RowCount));
            }

            return [.. results];

            int Heads(int layer) => layouts[layer].KvHeads * (1 + (layer * 2 % 5));
        });
    }

    [Theory]
    [MemberData(nameof(Layouts))]
    public void A_copied_block_holds_every_layer_and_head_and_no_other_block_changes(string kind)
    {
        KvLayout[] layouts = LayoutsOf(kind);
        Bench bench = New();
        const int Blocks = 4; // and one more, of the attending row
        KvCache cache = bench.Backend.AllocateKvCache(Blocks + 1, layouts);
        RopeTable[] ropes = [.. layouts.Select(layout => bench.Rope(layout.KeyDim, 32))];
        int[] blocks = [.. Enumerable.Range(0, Blocks)];
        for (int layer = 0; layer < layouts.Length; layer++)
        {
            int heads = layouts[layer].KvHeads;
            Tensor qkv = bench.Tensor(Blocks * KvCache.BlockTokens, Bench.Columns(heads, layouts[layer]));
            bench.StoreBlocks(blocks, qkv, heads, ropes[layer], cache, layer);
        }

        float[][] rows = [.. layouts.Select(layout => bench.Values(Bench.Columns(layout.KvHeads, layout)))];
        float[][] before = [.. blocks.Select(Contents)];
        Assert.Equal(Blocks, before.Select(values => string.Join(' ', values)).Distinct().Count());
        bench.Backend.CopyBlock(cache, 3, 1);
        bench.Backend.CopyBlock(cache, 2, 2);
        int[] now = [0, 3, 2, 3];
        foreach (int block in blocks)
            Bench.SameBits(before[now[block]], Contents(block), $"block {block}");

        float[] Contents(int block)
        {
            bench.Backend.BeginStep(Bench.Step(2, [[16]], [[block, Blocks]]));
            List<float> all = [];
            for (int layer = 0; layer < layouts.Length; layer++)
            {
                int heads = layouts[layer].KvHeads;
                Tensor qkv = bench.Tensor(rows[layer].Length, rows[layer]);
                Tensor output = bench.Backend.AllocateTensor(1, heads * layouts[layer].ValueDim);
                bench.Attend(qkv, heads, ropes[layer], cache, layer, output);
                all.AddRange(Bench.Read(output, 1));
            }

            return [.. all];
        }
    }

    /// <summary>Attention of single rows: other layers, other heads, the same and other tensors, with norms and without.</summary>
    [Fact]
    public void Attentions_of_a_step_one_after_another_do_not_disturb_each_other()
    {
        Bench bench = New();
        const int HeadDim = 16, Rows = 3, Before = 20;
        RopeTable rope = bench.Rope(HeadDim, 32);
        Weight queryNorm = bench.Weight(1, HeadDim), keyNorm = bench.Weight(1, HeadDim);
        (int Layer, int Heads, Weight? QueryNorm, Weight? KeyNorm)[] calls =
            [(0, 2, queryNorm, keyNorm), (1, 2, null, null), (1, 4, null, keyNorm), (0, 4, queryNorm, null), (0, 2, null, null)];
        float[][] prompts = [.. calls.Select(_ => bench.Values(Rows * Before * 6 * HeadDim))];
        float[][] values = [.. calls.Select(call => bench.Values(Rows * (call.Heads + 4) * HeadDim))];

        // Each in its own cache and step, and all in one step, each in its own layers or in the same one.
        float[][] expected = [.. calls.Select((_, i) => Run([i], apart: true)[0])];
        float[][] together = Run([0, 1, 2, 3, 4], apart: true), shared = Run([0, 1, 2, 3, 4], apart: false);
        for (int i = 0; i < calls.Length; i++)
        {
            Bench.SameBits(expected[i], together[i], $"call {i}");
            Bench.SameBits(expected[i], shared[i], $"call {i} in a shared cache");
        }

        float[][] Run(int[] which, bool apart)
        {
            List<KvCache> caches = [];
            foreach (int i in which)
            {
                KvCache cache = apart || caches.Count == 0 ? bench.Cache(2, Rows * 2, 2, HeadDim) : caches[0];
                caches.Add(cache);
            }

            // Where several attend in one layer, their context is the same.
            foreach ((int i, KvCache cache) in which.Zip(caches))
            {
                bench.Backend.BeginStep(Bench.Step(Rows, 2, _ => (0, Before), (s, b) => (s * 2) + b));
                bench.Store(bench.Tensor(6 * HeadDim, prompts[calls[i].Layer]), 2, rope, cache, calls[i].Layer);
            }

            bench.Backend.BeginStep(Bench.Step(Rows, 2, _ => (Before, Before + 1), (s, b) => (s * 2) + b));
            Tensor[] outputs = [.. which.Select(i => bench.Backend.AllocateTensor(Rows, calls[i].Heads * HeadDim))];
            foreach ((int i, int n) in which.Select((i, n) => (i, n)))
            {
                (int layer, int heads, Weight? ofQueries, Weight? ofKeys) = calls[i];
                Tensor qkv = bench.Tensor((heads + 4) * HeadDim, values[i]);
                bench.Attend(qkv, heads, rope, caches[n], layer, outputs[n], 0.3f, ofQueries, ofKeys, 1e-6f);
            }

            return [.. outputs.Select(output => Bench.Read(output, Rows))];
        }
    }

    [Fact]
    public void Layouts_that_no_layer_can_have_are_refused()
    {
        Bench bench = New();
        KvLayout good = new(1, 16, 16);
        foreach (KvLayout wrong in (KvLayout[])[new(0, 16, 16), new(-1, 16, 16), new(1, 7, 7), new(1, 0, 16), new(1, 16, 0), default])
        {
            Assert.Throws<ArgumentOutOfRangeException>("layers", () => bench.Backend.AllocateKvCache(1, wrong));
            Assert.Throws<ArgumentOutOfRangeException>("layers", () => bench.Backend.AllocateKvCache(1, good, wrong));
        }

        Assert.Throws<ArgumentOutOfRangeException>("layers", () => bench.Backend.AllocateKvCache(1));
        Assert.Throws<ArgumentOutOfRangeException>("blocks", () => bench.Backend.AllocateKvCache(0, good));
        KvCache cache = bench.Backend.AllocateKvCache(2, good, new KvLayout(2, 8, 8));
        Assert.Equal((2, 2, good, new KvLayout(2, 8, 8)), (cache.Layers, cache.Blocks, cache.Layout(0), cache.Layout(1)));
    }
}
