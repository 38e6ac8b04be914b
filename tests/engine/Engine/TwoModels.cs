using Rollout.Kernels;

namespace Rollout.Engine.Tests;

/// <summary>
/// Two sets of weights of one shape, run by hand over one KV cache: the reference for an engine that swaps one for the other.
/// </summary>
internal sealed class TwoModels : IDisposable
{
    private readonly ModelSpec _spec;
    private readonly Backend _backend;
    private readonly Transformer _transformer;
    private readonly Workspace _workspace;
    private readonly WeightSet _old;
    private readonly WeightSet _new;

    public TwoModels(Backend backend, string oldFolder, string newFolder)
    {
        _backend = backend;
        _spec = ModelSpec.Load(oldFolder);
        _transformer = new Transformer(_spec);
        _workspace = _transformer.AllocateWorkspace(backend, maxRows: 512, _spec.MaxPositions);
        _old = Load(oldFolder);
        _new = Load(newFolder);
    }

    /// <summary>
    /// Samples a sequence alone, a token a step: the old model draws the first <paramref name="swap"/> tokens, the new one the rest,
    /// reading the keys and values the old one wrote.
    /// </summary>
    public (int[] Tokens, float[] LogProbs) Run(GroupRequest request, int sampleIndex, int swap)
    {
        int total = request.Prompt.Length + request.MaxTokens!.Value;
        int blocks = KvBlocks.CountFor(total);
        using KvCache kv = _backend.AllocateKvCache(blocks, _transformer.Kv);
        StepLayout step = new(512, 1, blocks, 1, 0, 0);
        for (int block = 0; block < blocks; block++) step.BlockTables[block] = block;
        List<int> all = [.. request.Prompt];
        List<float> logProbs = [];
        for (int computed = 0; all.Count < total;)
        {
            step.Clear();
            int rows = all.Count - computed;
            step.SequenceCount = 1;
            step.RowStart[1] = rows;
            for (int row = 0; row < rows; row++) (step.TokenIds[row], step.Positions[row]) = (all[computed + row], computed + row);
            step.OutputRows[step.OutputCount++] = rows - 1;
            step.Queries[step.QueryCount++] = new SampleQuery
            {
                Target = -1,
                Temperature = request.Temperature,
                TopP = request.TopP,
                Seed = request.Seed,
                SampleIndex = (uint)sampleIndex,
                Position = all.Count,
            };
            WeightSet weights = logProbs.Count < swap ? _old : _new;
            _transformer.Forward(step, weights, kv, _workspace);
            _transformer.Sample(step, weights, _workspace);
            _backend.FinishStep(step);
            computed = all.Count;
            all.Add(step.Results[0].Token);
            logProbs.Add(step.Results[0].LogProb);
        }

        return ([.. all.Skip(request.Prompt.Length)], [.. logProbs]);
    }

    public void Dispose()
    {
        _workspace.Dispose();
        _old.Dispose();
        _new.Dispose();
    }

    private WeightSet Load(string folder)
    {
        using Checkpoint checkpoint = Checkpoint.Open(folder);
        WeightSet weights = WeightSet.Allocate(_backend, _transformer.Weights);
        ModelLoader.Load(checkpoint, _transformer.Weights, _backend, weights, progress: null);
        return weights;
    }
}
