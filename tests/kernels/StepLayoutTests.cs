using CsCheck;

namespace Rollout.Kernels.Tests;

public sealed class StepLayoutTests
{
    [Fact]
    public void Biases_of_all_queries_stay_what_they_were_however_many_come_after_them()
    {
        StepLayout step = new(4, 4, 1, 4, 1, 4);
        Gen.Int[0, 9].Array[0, 12].Sample(
            sizes =>
            {
                step.Clear();
                Assert.Equal((0, 0, 0), (step.SequenceCount, step.OutputCount, step.QueryCount));
                Assert.Equal((0, 0), (step.AlternativesCount, step.BiasCount));
                int[] ids = [.. Enumerable.Range(100, sizes.Sum())];
                float[] values = [.. ids.Select(id => id * 0.5f)];
                int at = 0;
                foreach (int size in sizes)
                {
                    Assert.Equal(at, step.AddBiases(ids.AsSpan(at, size), values.AsSpan(at, size)));
                    at += size;
                    Assert.Equal(at, step.BiasCount);
                }

                Assert.Equal(ids, step.BiasIds[..at]);
                Assert.Equal(values, step.BiasValues[..at]);
                (step.SequenceCount, step.OutputCount, step.QueryCount, step.AlternativesCount) = (2, 3, 4, 1);
            },
            iter: 300,
            threads: 1);
    }

    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    [InlineData(4)]
    public void A_query_may_bring_more_biases_than_there_ever_was_room_for(int room)
    {
        StepLayout step = new(1, 1, 1, 1, 0, room);
        int[] ids = [.. Enumerable.Range(0, 1000)];
        float[] values = [.. ids.Select(id => -(float)id)];
        Assert.Equal(0, step.AddBiases([7], [8f]));
        Assert.Equal(1, step.AddBiases(ids, values));
        Assert.Equal([7, .. ids], step.BiasIds[..1001]);
        Assert.Equal([8f, .. values], step.BiasValues[..1001]);
    }

    [Theory]
    [InlineData("bf16", WeightFormat.BFloat16)]
    [InlineData("bf16-fast", WeightFormat.BFloat16Fast)]
    [InlineData("int8", WeightFormat.Int8)]
    [InlineData("fp32", WeightFormat.Float32)]
    public void Formats_have_the_names_that_people_write(string name, WeightFormat format)
    {
        Assert.Equal(format, WeightFormats.Parse(name));
        Assert.Equal(name, WeightFormats.NameOf(format));
        Assert.Equal(format != WeightFormat.Float32, WeightFormats.CpuNames.Contains(name));
        Assert.Throws<InvalidOperationException>(() => WeightFormats.Parse(name + "x"));
    }

    [Theory]
    [InlineData(DType.BFloat16, 2, "BF16")]
    [InlineData(DType.Float16, 2, "F16")]
    [InlineData(DType.Float32, 4, "F32")]
    public void Types_have_the_sizes_and_names_of_safetensors(DType type, int size, string name) =>
        Assert.Equal((size, name), (type.Size(), type.SafetensorsName()));
}
