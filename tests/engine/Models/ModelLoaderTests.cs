using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>A checkpoint that does not fit its config is refused; nothing of it is left out or bent to fit.</summary>
public sealed class ModelLoaderTests
{
    [Fact]
    public void A_tensor_that_is_missing_or_has_another_shape_or_no_place_is_named()
    {
        PlainModel model = Small();
        List<(string Name, long[] Shape)> fits = [.. model.Shapes.Select(tensor => (tensor.Key, tensor.Value.ToArray()))];
        Assert.Empty(Problems(model, fits));
        Assert.Empty(Problems(model, [.. fits, ("lm_head.weight", [7, 6])])); // a tied head that was saved, too
        foreach ((string name, long[] shape) in fits)
        {
            List<(string, long[])> others = [.. fits.Where(tensor => tensor.Name != name)];
            Assert.Contains($"'{name}' is missing", Assert.Single(Problems(model, others)), StringComparison.Ordinal);
            long[][] wrong = shape is [var rows, var columns]
                ? [[columns, rows + 1], [rows * columns], .. rows == columns ? (long[][])[] : [[columns, rows]]]
                : [[1, shape[0]], [shape[0] + 1]];
            foreach (long[] other in wrong)
            {
                string problem = Assert.Single(Problems(model, [.. others, (name, other)]));
                Assert.Contains($"'{name}' has shape", problem, StringComparison.Ordinal);
            }
        }

        // Biases the config does not speak of would change every token.
        foreach (string extra in (string[])["model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.up_proj.weight", "anything"])
            Assert.Contains($"'{extra}' has no place", Assert.Single(Problems(model, [.. fits, (extra, [1])])), StringComparison.Ordinal);
    }

    [Fact]
    public void A_tensor_of_another_type_is_named()
    {
        PlainModel model = Small();
        List<(string Name, long[] Shape)> fits = [.. model.Shapes.Select(tensor => (tensor.Key, tensor.Value.ToArray()))];
        using TemporaryFolder folder = new();
        Save(folder, fits);
        byte[] file = File.ReadAllBytes(folder["model.safetensors"]);
        int at = file.AsSpan().IndexOf("\"BF16\""u8);
        "\"I16\" "u8.CopyTo(file.AsSpan(at));
        folder.Write("model.safetensors", file);
        Assert.Contains("is I16; BF16, F16 and F32 are served", Assert.Single(Load(model, folder)), StringComparison.Ordinal);
    }

    private static PlainModel Small()
        => PlainModel.Of("llama", 1, heads: 2, kvHeads: 1, headDim: 4, hidden: 6, intermediate: 5, vocabulary: 7, tied: true);

    private static IReadOnlyList<string> Problems(PlainModel model, List<(string, long[])> tensors)
    {
        using TemporaryFolder folder = new();
        Save(folder, tensors);
        return Load(model, folder);
    }

    private static void Save(TemporaryFolder folder, List<(string Name, long[] Shape)> tensors)
        => SafetensorsWriter.Write(folder["model.safetensors"], tensors.Select(tensor =>
        {
            TensorDeclaration declaration = new(tensor.Name, DType.BFloat16, tensor.Shape);
            return (declaration, new byte[declaration.Bytes]);
        }));

    private static IReadOnlyList<string> Load(PlainModel model, TemporaryFolder folder)
    {
        using Checkpoint checkpoint = Checkpoint.Open(folder.Path);
        using CpuBackend backend = new(1);
        using WeightSet weights = WeightSet.Allocate(backend, model.Plan);
        Exception? e = Record.Exception(() => ModelLoader.Load(checkpoint, model.Plan, backend, weights, progress: null));
        return e is null ? [] : Assert.IsType<InvalidModelException>(e).Problems;
    }
}
